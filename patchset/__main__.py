# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m patchset`."""

import sys

from patchset.cli import main

sys.exit(main())
