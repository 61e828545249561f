# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The one exception that the command line turns into a message and exit code 1."""


class PatchError(Exception):
    """Something the user can act on: the message says what was found and what to do."""
