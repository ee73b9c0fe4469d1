"""How OpenMP's idle threads wait. Import before torch: its OpenMP library reads the variable when it is loaded.

By default an idle thread of libgomp spins for a while after every parallel operator. The kernels run tasks on threads
of their own (model/kernels/cpu/workers.py), and a spinning thread then holds a core that a worker needs. So the kernels
are faster with OMP_WAIT_POLICY=passive (docs/kernels.md has times); operators that use OpenMP alone are as fast either
way.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
