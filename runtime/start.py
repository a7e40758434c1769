"""`python -m runtime.start SOCKET_FD BLACKBOX_FD PARENT_PID`: a worker from its first moment on.

Imports make no garbage worth a look, and the looks take a tenth of their time: so the collector is off until the model
is loaded.
"""

import gc

gc.disable()

from runtime.worker import main  # noqa: E402  # see above

main()
