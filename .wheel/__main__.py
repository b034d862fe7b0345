"""`python -m openai_fake` for the wheel, in which the module is a package."""

import sys

from openai_fake import main

sys.exit(main())
