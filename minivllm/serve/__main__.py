"""`python -m minivllm.serve [MODEL] ...`"""

import sys

from minivllm.serve.server import main

if __name__ == "__main__":
    sys.exit(main())
