"""What is measured and compiled.

To put a kernel into the compile matrix: give its ``forward.py`` or ``backward.py`` the generator

    def compile_cases(capability: Capability) -> Iterator[Case]

described in ``molora_kernels/_triton/cases.py`` (take the tiles from the selector that the launcher calls), and add
the module here.
"""

KERNEL_MODULES = (
    "molora_kernels._triton.total",
    "molora_kernels.router.forward",
    "molora_kernels.router.backward",
    "molora_kernels.grouped_lora.forward",
    "molora_kernels.grouped_lora.gating",
    "molora_kernels.grouped_lora.backward",
    "molora_kernels.grouped_lora.sets",
    "molora_kernels.grouped_lora.grouped",
    "molora_kernels.mlp_block.forward",
    "molora_kernels.mlp_block.backward",
)
