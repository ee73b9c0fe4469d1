"""How OpenMP's idle threads wait. Import before torch: its OpenMP library reads the variable when it is loaded.

By default an idle thread of libgomp spins for milliseconds after every parallel operator. The kernels run tasks on
threads of their own (model/kernels/workers.py), and the spinning thread then holds a core that a worker needs:
SwitchHead's value and output ops (N = 2048, d = 1024, H = 4, h = 112, E = 4, k = 2, two threads, fp32) took 33 and
43 ms forward, 88 and 76 backward with spinning threads, and 24, 27, 56 and 47 with sleeping ones. Operators that use
OpenMP alone are as fast either way (the dense layer of the same size: 380 and 383 ms).
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
