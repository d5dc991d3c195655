"""The tracker: every live byte of a training step, by component and phase, on any device and on fake tensors.

How it works: a `TorchDispatchMode` sees each tensor that an operator returns. It counts the tensor's storage once,
however many views share it, and notes when the storage dies. What a storage was is often known only later: a gradient
is a temporary until backward hands it over. So components are settled when tracking ends. Workspaces inside kernels are
not seen, but for those of our own operators, since no operator returns them.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from fullft.attention import documents, packed
from fullft.data.micro_batch import MicroBatch
from fullft.errors import ModelError
from fullft.memory.collectives import BETWEEN_RANKS, Sent, gradients_in, sent_by, watching_resizes
from fullft.memory.profile import COMPONENTS, Moment, Profile
from fullft.model.parts import decoder_layers, decoder_of
from fullft.optim.adamw import AdamW
from fullft.storage.tiers import home_of, is_on_host, local_of
from fullft.tracing import is_fake
from fullft.transforms.activation_checkpointing import tensors_in
from fullft.transforms.sharding import sharding_of
from fullft.transforms.streaming import stream_of

_BODIES = documents.BODIES | packed.BODIES

# Not a component of the device's memory: what the run holds in the host's, where that is another one.
HOST = "host"


@dataclass(eq=False)
class Block:
    """One storage: its bytes, what it is, and the innermost module that was at work when it was made."""

    num_bytes: int
    component: str
    module: str


class MemoryTracker(TorchDispatchMode):
    """Tracks a model at work. A context manager; `forward()`, `backward()` and the like mark the phases within.

    Args:
        model: its parameters and buffers are counted; it carries hooks while it is tracked.
        optimizer: its states are counted, those made later too.
    """

    def __init__(self, model: PreTrainedModel, optimizer: AdamW) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.optimizer = model, optimizer
        self._blocks: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._references: dict[int, weakref.ref[Any]] = {}
        self._events: list[tuple[int, Block, Moment]] = []
        self._moment = Moment(0, "forward", -1)
        self._in_loss = False
        self._modules: list[str] = []
        self._born: list[weakref.ref[Block]] = []  # of the forward (or recomputation) under way
        self._sent: list[Sent] = []  # by each micro-batch so far
        self._gathered: set[nn.Parameter] = set()
        self._previous: Any = torch.ops.prim.device.default  # operator
        self._whole_gradients: set[Block | None] = set()  # not yet summed over ranks
        for parameter in model.parameters():
            self._see(local_of(parameter), "parameters")
            if isinstance(home := home_of(parameter), torch.Tensor):
                self._see(home, "parameters")
        for buffer in model.buffers():
            self._see(buffer, "other")
        if (layers := stream_of(model)) is not None:
            for memory in layers.memory:
                self._see(memory, "parameters")
        self._label_optimizer_states()

    # ------------------------------------------------------------------------------------------ phases

    def forward(self, micro_batch: MicroBatch) -> None:
        """Mark the start of a micro-batch's forward pass.

        Args:
            micro_batch: its tensors count as `other`.
        """
        self._begin("forward")
        self._sent.append(Sent())
        self._label_inputs(micro_batch)

    def backward(self) -> None:
        """Mark the end of the loss and the start of backward: what forward left alive are the activations."""
        self._settle_activations()
        self._begin("backward", layer=len(self._layers))

    def earlier_micro_batch(self) -> None:
        """Put gradients of an earlier micro-batch in place, without its forward and backward."""
        self._begin("backward")
        self.optimizer.gradients.pretend()
        for parameter in self.optimizer.parameters:
            self._gradient_arrived(parameter)

    def optimizer_step(self) -> None:
        """Mark the start of clipping and of the step."""
        self._settle_activations()
        self._begin("optimizer_step")

    def evaluation(self, micro_batch: MicroBatch) -> None:
        """Mark the start of an evaluation batch.

        Args:
            micro_batch: held out; its tensors count as `other`.
        """
        self._label_optimizer_states()
        self._begin("evaluation")
        self._label_inputs(micro_batch)

    def _label_inputs(self, micro_batch: MicroBatch) -> None:
        bounds = () if micro_batch.documents is None else (micro_batch.documents.bounds,)
        if micro_batch.labels.device.type == "cpu":
            bounds = ()  # they stay with the rows
        for tensor in (*micro_batch.inputs.values(), micro_batch.labels, *bounds):
            self._relabel(tensor, "other")

    def _begin(self, phase: str, layer: int = -1) -> None:
        self._moment = Moment(self._moment.part + 1, phase, layer)
        self._in_loss = False
        self._born.clear()

    # ------------------------------------------------------------------------------------------ seeing

    def __enter__(self) -> "MemoryTracker":
        """Start tracking."""
        self._hooks = ExitStack()
        self._add_hooks()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop tracking, and take the hooks off the model."""
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._label_optimizer_states()
        self._hooks.close()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and see what it returns."""
        if DTensor in types:
            return NotImplemented  # its operators on this rank's rows come here by themselves
        if operator is torch.ops.prim.device.default and is_fake(args[0]):
            return args[0].fake_device  # so frequent that answering here saves an eighth of a plan's time
        if operator is torch.ops.aten._unsafe_view.default and is_fake(args[0]):
            operator = torch.ops.aten.view.default  # the same to storages, and fake tensors cache it
        result = self._run(operator, args, kwargs or {})
        previous, self._previous = self._previous, operator
        if operator is torch.ops.aten.split.Tensor and previous.namespace == "c10d":
            return result  # of gloo's own copy of what came: a workspace, which one of its threads frees
        recomputing = self._moment.phase == "backward" and torch.is_grad_enabled()
        if self._moment.phase == "backward" and not recomputing and self._born:
            self._settle_activations()  # recomputation is over, and backward uses what it left
        component, may_be_kept = self._component_made(operator, args, kwargs or {})
        for tensor in tensors_in(result):
            block = self._see(tensor, component)
            if block and may_be_kept and (recomputing or self._moment.phase == "forward"):
                self._born.append(weakref.ref(block))
        return result

    def _component_made(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, bool]:
        """Return what an operator makes, and whether that may become an activation."""
        if kwargs.get("pin_memory"):
            return HOST, False
        source = self._block_of(args[0]) if operator is torch.ops.aten._to_copy.default else None
        if source in self._whole_gradients:
            return "gradients", False  # in the dtype that they are added up in
        if source is not None and source.component == "parameters":
            return "temporaries", False  # autocast's copy of a weight, which outlives the forward
        return "logits" if self._in_loss else "temporaries", True

    def _run(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if body := _BODIES.get(operator):
            with self._tracking_within():
                return body(*args, **kwargs)
        if operator in BETWEEN_RANKS:
            self._see_ranks(operator, args, kwargs)
        return operator(*args, **kwargs)

    @contextmanager
    def _tracking_within(self) -> Iterator[None]:
        """Track what one of our own operators does, whose scratch memory counts too."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _see(self, tensor: torch.Tensor, component: str) -> Block | None:
        """Count a tensor's storage, unless it is known; return its block if it is new."""
        storage = tensor.untyped_storage()
        if storage in self._blocks:
            return None
        if tensor.device.type == "cpu" != self.model.device.type or is_on_host(tensor):
            component = HOST
        return self._count(storage, Block(storage.nbytes(), component, self._modules[-1] if self._modules else ""))

    def _count(self, storage: torch.UntypedStorage, block: Block) -> Block:
        self._blocks[storage] = block
        self._references[id(block)] = weakref.ref(storage, self._release(block))
        self._events.append((1, block, self._moment))
        return block

    def _release(self, block: Block) -> Callable[[Any], None]:
        def released(_: Any) -> None:
            self._events.append((-1, block, self._moment))
            self._references.pop(id(block), None)

        return released

    def _block_of(self, tensor: Any) -> Block | None:
        return self._blocks.get(tensor.untyped_storage()) if isinstance(tensor, torch.Tensor) else None

    def _relabel(self, tensor: torch.Tensor, component: str) -> None:
        self._see(tensor, component)
        block = self._blocks[tensor.untyped_storage()]
        block.component = HOST if is_on_host(tensor) else component

    def _settle_activations(self) -> None:
        for reference in self._born:
            block = reference()
            if block is None or id(block) not in self._references:
                continue
            if block.component == "temporaries":
                block.component = "activations"
            elif block.component == "logits":  # the logits are gone: this is a gradient of the head's, on its way
                block.component = "temporaries"
        self._born.clear()

    def _label_optimizer_states(self) -> None:
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self._relabel(value, "optimizer_states")

    # ------------------------------------------------------------------------------------------ ranks

    def _watch_sharding(self) -> None:
        """Watch weights that are gathered and dropped. FSDP keeps their storages, and resizes them."""
        if not any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            return
        for module in sharding_of(self.model).decoder.modules():
            if isinstance(module, FSDPModule):
                self._keep(module.register_forward_pre_hook(self._weights_gathered))
        self._hooks.enter_context(watching_resizes(self._weights_resized))

    def _weights_gathered(self, unit: nn.Module, _: Any) -> None:
        for parameter in unit.parameters():
            if not isinstance(parameter, DTensor) and parameter not in self._gathered:
                self._gathered.add(parameter)
                self._relabel(parameter, "parameters")
                self._keep(parameter.register_post_accumulate_grad_hook(self._whole_gradient_arrived))

    def _whole_gradient_arrived(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self._relabel(parameter.grad, "gradients")
        self._whole_gradients.add(self._blocks[parameter.grad.untyped_storage()])

    def _weights_resized(self, storage: torch.UntypedStorage) -> None:
        if (former := self._blocks.get(storage)) is not None:
            del self._references[id(former)]
            self._events.append((-1, former, self._moment))
        self._count(storage, Block(storage.nbytes(), "parameters", ""))

    def _see_ranks(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._sent and self._moment.phase != "evaluation":
            self._sent[-1] += sent_by(operator, args)
        for gradient in gradients_in(operator, args, kwargs):
            self._relabel(gradient, "gradients")

    # ------------------------------------------------------------------------------------------ hooks

    def _add_hooks(self) -> None:
        try:
            self._layers = list(decoder_layers(self.model))
        except ModelError:
            self._layers = []  # moments in a model without a stack of layers have no layer
        decoder = decoder_of(self.model)  # by a call that must not be tracked
        for name, module in self.model.named_modules():
            self._keep(module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
            self._keep(module.register_forward_hook(self._leave_module, always_call=True))
        for index, layer in enumerate(self._layers):
            self._keep(
                layer.register_forward_pre_hook(lambda _, args, kw, i=index: self._enter(i, args, kw), with_kwargs=True)
            )
            self._keep(layer.register_forward_hook(lambda _, args, output, i=index: self._leave(i, output)))
        self._keep(decoder.register_forward_hook(self._end_of_decoder))
        for parameter in self.model.parameters():
            self._keep(parameter.register_post_accumulate_grad_hook(self._gradient_arrived))
        self._watch_sharding()

    def _keep(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _leave_module(self, *_: Any) -> None:
        self._modules.pop()

    def _gradient_arrived(self, parameter: nn.Parameter) -> None:
        gradient = self.optimizer.gradients.of(parameter)  # its own hook came first, and may have moved the gradient
        if isinstance(gradient, torch.Tensor):
            self._relabel(gradient, "gradients")

    def _at_layer(self, index: int) -> None:
        self._moment = Moment(self._moment.part, self._moment.phase, index)

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._at_layer(index)
        hidden = args[0] if args else kwargs.get("hidden_states")
        if index == 0 and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: self._at_layer(-1))

    def _leave(self, index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: self._at_layer(index))
        if index == len(self._layers) - 1:
            self._at_layer(len(self._layers))

    def _end_of_decoder(self, *_: Any) -> None:
        """Count what the head and the loss make from now on as logits; what backward needs of it exists already."""
        self._in_loss = True

    # ------------------------------------------------------------------------------------------ result

    def profile(self) -> Profile:
        """Add up the events, each under the component that its storage turned out to be."""
        live = dict.fromkeys((*COMPONENTS, HOST), 0)
        host_bytes = 0
        curves: dict[str, list[int]] = {name: [] for name in COMPONENTS}
        totals: list[int] = []
        for sign, block, _ in self._events:
            live[block.component] += sign * block.num_bytes
            host_bytes = max(host_bytes, live[HOST])
            totals.append(sum(live.values()) - live[HOST])
            for name in COMPONENTS:
                curves[name].append(live[name])
        moments = [moment for *_, moment in self._events]
        profile = Profile(moments, totals, curves, [])
        modules = self._modules_at(profile.peak)
        disk_bytes = self.optimizer.storage.disk_bytes
        return Profile(moments, totals, curves, modules, host_bytes, disk_bytes, tuple(self._sent))

    def _modules_at(self, event: int) -> list[tuple[str, int]]:
        alive: dict[str, int] = {}
        for sign, block, _ in self._events[: event + 1]:
            if block.component not in ("parameters", "gradients", "optimizer_states", HOST):
                alive[block.module] = alive.get(block.module, 0) + sign * block.num_bytes
        return sorted(((name, size) for name, size in alive.items() if size), key=lambda item: -item[1])
