"""What the environment has to say before torch is imported: OpenMP's threads that wait soon let others run.

By default they spin. On two cores that two other trainings kept busy a training step then took over 9 s; it took 1.5 s
like this, and 1.1 s with ``OMP_WAIT_POLICY=PASSIVE``. Alone it took 0.33, 0.37 and 0.55 s (prunet, 64 images of 32 px).
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
