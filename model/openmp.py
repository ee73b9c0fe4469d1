"""How OpenMP's idle threads wait. Import before torch: its OpenMP library reads the variable when it is loaded.

By default an idle thread of libgomp spins for a while after every parallel operator. The kernels run tasks on threads
of their own (model/kernels/cpu/workers.py), and a spinning thread then holds a core that a worker needs. SwitchHead's
value and output ops (N = 2048, d = 1024, H = 4, h = 112, E = 4, k = 2, two threads on two cores, fp32) take 33 and 43
ms forward, 88 and 76 backward with OMP_WAIT_POLICY=active, 24, 27, 56 and 47 with passive. The default lies in between:
the whole attention layer took 0.79 to 0.87 of the dense layer's time, with passive 0.73 to 0.89, median 0.76.
Operators that use
OpenMP alone are as fast either way (the dense layer: 380 and 383 ms).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
