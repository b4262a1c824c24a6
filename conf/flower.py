"""What Flower shows and keeps: ``celery -A rerankq.broker flower --conf=conf/flower.py``.

The password is not here: set ``FLOWER_BASIC_AUTH=user:password``. Flower serves ``/metrics`` and ``/healthcheck``
without asking for it, so its port belongs behind the loopback or a proxy.
"""

# Jobs kept in memory. Flower's own default holds five times as many, which is a lot of memory on a busy queue.
max_tasks = 20_000
# Seconds after which a worker that is gone disappears from the list.
purge_offline_workers = 300
# The arguments are a few words that describe the job, the result a short summary.
tasks_columns = "uuid,args,state,result,exception,received,runtime,worker"
