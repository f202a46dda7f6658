"""`python -m minivllm.bench throughput|latency|anatomy|serve ...`"""

import sys

from minivllm.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
