# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""GPUs that need not be there, as the plan sees them: one for each compile target."""

import sys

import pytest

from vllm.attention.ops.conch import hopper_prefill
from vllm.attention.ops.conch.plan import Device, count_xcds

KIB = 1024
DEVICES = {
    "A100": Device("cuda", 80, 108, 163 * KIB),
    "L40S": Device("cuda", 89, 142, 99 * KIB),
    "H200": Device("cuda", 90, 132, 227 * KIB, bandwidth=4.917e12),
    "B200": Device("cuda", 100, 148, 227 * KIB),
    "RTX 5090": Device("cuda", 120, 170, 99 * KIB),
    "MI250X": Device("hip", "gfx90a", 104, 64 * KIB),
    "MI300X": Device("hip", "gfx942", 304, 64 * KIB, count_xcds("gfx942", 304)),
    "MI355X": Device("hip", "gfx950", 256, 160 * KIB, count_xcds("gfx950", 256)),
    "RX 7900 XTX": Device("hip", "gfx1100", 48, 64 * KIB),
}


def use_device(monkeypatch: pytest.MonkeyPatch, device: Device) -> None:
    """Has all of CONCH that is imported plan for a device."""
    for name, module in list(sys.modules.items()):
        if (
            name.startswith("vllm.")
            and "conch" in name
            and "this_device" in vars(module)
        ):
            monkeypatch.setattr(module, "this_device", lambda index: device)
    monkeypatch.setattr(hopper_prefill, "num_programs", lambda _: device.num_units)
