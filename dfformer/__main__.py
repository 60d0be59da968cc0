import sys

from dfformer.cli.main import main

sys.exit(main())
