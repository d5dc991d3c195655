"""GPUs by name: how much they compute per second.

Owns the vendors' figures. How much memory a card has is asked of the card, or planned for by size.
"""

import torch

# Dense bf16 matrix products per second with fp32 accumulation, in operations. Source: the vendor's data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "L4": 121e12,
    "A10G": 70e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Give a GPU's peak in bf16, in operations per second, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)
