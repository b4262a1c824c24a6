"""Words that carry grammar and no subject, left out of the analysis."""

from __future__ import annotations

ENGLISH = frozenset(
    """
    a an the this that these those such same other another each every either neither both all any some no none
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one oneself
    who whom whose which what when where why how whether
    am is are was were be been being do does did doing done have has had having
    can could may might must shall should will would ought
    and or but nor so yet if then than because although though while since until unless as
    of in on at by for with about against between among into onto through during before after above below to from
    up down out off over under again further once here there upon within without via per
    not only own too very just also more most less least much many few several ever never always
    """.split()  # noqa: SIM905 - reads better as text
)

CHINESE = frozenset(
    """
    的 了 着 过 得 地 之 是 在 有 和 与 及 或 而 且 但 也 都 就 又 还 才 则 即 若 于 以 为 被 把 将 对 从 向 给 让 由
    到 这 那 其 此 该 每 各 我 你 他 她 它 们 吗 呢 吧 啊 呀 嘛 哦 么 什么 怎么 怎样 如何 哪 哪些 哪个 哪里 谁 为什么 几
    我们 你们 他们 她们 它们 这个 那个 这些 那些 这样 那样 这里 那里 可以 能够 能 会 要 应 应该 应当 并 并且 而且 以及
    或者 还是 但是 因为 所以 如果 虽然 不过 然后 因此 由于 对于 关于 按照 根据 一个 一种 一些 是否 很 太 更 最 上 下
    """.split()  # noqa: SIM905 - reads better as text
)
