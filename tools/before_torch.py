"""What the environment has to say before torch is imported: OpenMP's threads that wait soon let others run.

By default they spin for long: where other processes keep the cores busy, every step becomes several times slower.
``OMP_WAIT_POLICY=PASSIVE`` helps there a little more, but makes steps slower where there is nothing else to run.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
