"""The name under which `torch.ops` has the operators.

A file of its own, because the kernels for a hub, which may be loaded beside the package and in several versions at
once, have another in its place (tools/make_hub_kernels.py).
"""

NAMESPACE = "nabla_fast"
