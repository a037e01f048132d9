"""What is fastest on the machine at hand, for options that are left to it."""

import torch


def fastest_precision(device: torch.device | str = "cpu") -> str:
    """ "bf16" where the processor multiplies bfloat16 itself, else "fp32": emulated, a training step takes eight times as long."""
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def compiles() -> bool:
    """Whether torch.compile works here: it needs a C++ compiler and Python's headers, and says so in many ways."""
    try:
        torch.compile(lambda values: values.sin() + 1)(torch.ones(8))
    except Exception:
        return False
    return True
