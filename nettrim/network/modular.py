"""A stored forward as a module: the same steps and the same names of weights, without the class they came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nettrim.errors import ProblemError
from nettrim.network.batches import Batch
from nettrim.network.program import Program, run


class ProgramModule(nn.Module):
    """Runs a program; its parameters have the names that they had in the model.

    Parameters
    ----------
    program : Program
    state : mapping from str to Tensor
        Everything that the program reads, by name.
    """

    def __init__(self, program: Program, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        # mangled, because a model may have a part called program
        self.__program = program
        for name, tensor in state.items():
            *owners, last = name.split(".")
            module: nn.Module = self
            for owner in owners:
                if owner not in module._modules:
                    module.add_module(owner, nn.Module())
                module = module.get_submodule(owner)
            if tensor.is_floating_point():
                module.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
            else:
                module.register_buffer(last, tensor.clone())
        self.eval()

    def forward(self, *inputs: Tensor, **kwargs: Tensor) -> Tensor:
        """Run the steps.

        Raises
        ------
        ProblemError
            It is handed other inputs than the model was.
        """
        given: dict[Any, Tensor] = {**dict(enumerate(inputs)), **kwargs}
        if set(given) != set(self.__program.inputs):
            takes = ", ".join(map(str, self.__program.inputs))
            raise ProblemError(f"forward is given inputs {', '.join(map(str, given))}, and takes {takes}.")
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return run(self.__program, state, Batch(inputs, dict(kwargs)), change=lambda index, value: value)
