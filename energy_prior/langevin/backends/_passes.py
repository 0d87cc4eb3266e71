"""What compiled steps change in torch's graphs. It imports the compiler, and is imported only where something is compiled."""

from __future__ import annotations

__all__ = ["BiasesApart"]

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass


class BiasesApart(CustomGraphPass):
    """Matrix products without their bias, which is added after, in one loop with the activation.

    On a CPU a product with a bias first writes the bias to every row of its result: one more pass over it.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Changes `graph` in place."""
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default):
            if node.kwargs:  # factors of the bias or of the product
                continue
            bias, a, b = node.args
            with graph.inserting_before(node):
                product = graph.call_function(torch.ops.aten.mm.default, (a, b))
                total = graph.call_function(torch.ops.aten.add.Tensor, (product, bias))
            product.meta, total.meta = dict(node.meta), dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)

    def uuid(self) -> str:
        """Of what the compiler keeps on disk."""
        return "energy_prior: biases apart, 1"
