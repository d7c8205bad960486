"""The name under which `torch.ops` has the operators: one of this version and backend alone."""

from ._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
