import sys

from halfstep.cli import main

sys.exit(main())
