import sys

from dfformer.cli import main

sys.exit(main())
