"""What a forked process runs to become a worker: `celery` with ARGUMENTS, in ENVIRONMENT, writing into LOG.

The three are globals that whoever runs this gives; the libraries were imported before the fork.
"""

import os
import runpy
import sys
import tempfile

os.setsid()
os.chdir(tempfile.gettempdir())
with open(LOG, "ab") as log:  # noqa: F821, PTH123
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
os.environ.clear()
os.environ.update(ENVIRONMENT)  # noqa: F821
sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
sys.argv = ["celery", *ARGUMENTS]  # noqa: F821
runpy.run_module("celery", run_name="__main__", alter_sys=True)
