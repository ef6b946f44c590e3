"""A `transformers` model whose blocks are run by a swarm.

In: what any causal language model takes. Out: what it gives: `generate()` with every decoding strategy,
`forward` with logits and loss, gradients to its inputs. The head (embedding, final norm, LM head) is in
this process, the blocks and the KV cache are on the nodes. Every failure is a SwarmError that passes
through `generate()` as it is. What is typed here is seen by every node of the chain.

Never computes a block here, never trains one there, and never returns attentions or hidden states of
blocks: asking for them is an InputError.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from swarm.client.autograd import GradientChains, remote_blocks
from swarm.client.cache import RemoteCache
from swarm.client.columns import new_columns
from swarm.client.loop import ClientLoop
from swarm.client.swarm import SwarmClient, open_client
from swarm.datadir import default_data_dir
from swarm.errors import InputError
from swarm.model.checkpoint import Checkpoint
from swarm.net.join import parse_join

_LOSS_ARGUMENTS = frozenset({"num_items_in_batch"})
_NOTHING_TO_DO = frozenset({"tokenizer", "assistant_tokenizer", "cache_position"})
"""What generate() passes on to every forward pass."""


class SwarmForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is untyped
    """A causal language model over a swarm. Make with `from_pretrained`; close it, or use it in a `with` block."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    # How attention is computed is the nodes' affair: no setting of the checkpoint is refused here.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, loop: ClientLoop, adapter: str = "", waiting: Callable[[int, str], None] | None = None) -> None:
        """Takes over `loop`, which `close` ends. Raises AdapterNotFound and what loading the head raises."""
        checkpoint = loop.client.checkpoint
        super().__init__(copy.deepcopy(checkpoint.config))
        self.head = loop.client.head.model
        self.all_tied_weights_keys: dict[str, str] = {}
        self.generation_config = _generation_config(checkpoint, self.config)
        self.adapter = adapter
        self._waiting = waiting
        self.eval()
        self._loop = loop
        self._plain_embedding: bool | None = None
        self._chains = GradientChains(loop, adapter)
        self._of_thread = threading.local()
        loop.call(lambda: loop.client.find_adapter(adapter))
        self._finalizer = weakref.finalize(self, loop.close)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        join: str,
        adapter: str = "",
        dtype: torch.dtype | str = torch.float32,
        encoding: str = "bfloat16",
        exact: bool = False,
        admission_s: float = 60.0,
        data_dir: Path | None = None,
        waiting: Callable[[int, str], None] | None = None,
    ) -> Self:
        """Load the head and connect.

        model: checkpoint folder or hub id; None: the one that the join string names, or the nodes hold.
        join: join string, or @FILE. adapter: name of an adapter that nodes announce. dtype: of the head.
        encoding: how activations cross the links ("float32" for exact results of fp32 nodes).
        exact: use only nodes whose weights are not quantized. admission_s: how long to wait for room.
        waiting: told (position in the queue, reason) while a node has no room, from another thread.
        Raises JoinStringError, JoinError, ModelNotFound, ModelMismatch, UnsupportedModel, AdapterNotFound.
        """
        dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"dtype cannot be {dtype!r}", "give torch.float32, torch.bfloat16 or torch.float16")
        info = parse_join(join)
        identity_path = (data_dir or default_data_dir("client")) / "identity.key"
        settings: dict[str, Any] = {"encoding": encoding, "exact": exact, "admission_s": admission_s}
        loop = ClientLoop(open_client(info, identity_path, str(model or ""), dtype=dtype, **settings))
        try:
            return cls(loop, adapter, waiting)
        except BaseException:
            loop.close()
            raise

    # Its life.

    def close(self) -> None:
        """Close sessions and chains and leave the swarm. Safe to call twice; happens on garbage collection too."""
        self._chains.close()
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def client(self) -> SwarmClient:
        """The client that all calls go through; its coroutines run on this model's loop."""
        return self._loop.client

    @contextmanager
    def session(self, expected_tokens: int = 0) -> Iterator[RemoteCache]:
        """Calls of `generate()` in this block, by this thread, continue one KV cache; closed at its end.

        Give the whole text each time: only what the cache lacks is sent, and what it holds
        beyond the common part is dropped. Without inputs the last answer is continued.
        expected_tokens: that the text will probably reach, for the nodes' admission.
        """
        cache, outer = self.new_cache(expected_tokens), getattr(self._of_thread, "session", None)
        self._of_thread.session = cache
        try:
            yield cache
        finally:
            self._of_thread.session = outer
            cache.close()

    def new_cache(self, expected_tokens: int = 0) -> RemoteCache:
        """An empty cache for `past_key_values`; its session is opened by the first step."""
        return RemoteCache(self._loop, self.adapter, expected_tokens, self._waiting)

    # One pass.

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, V], the loss with `labels`, and the cache, as any causal model of transformers.

        use_cache: open a session and return it; None means the configuration's default, but never with
        labels or gradients. Raises InputError and what a session raises.
        """
        _refuse(output_attentions, output_hidden_states, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give either input_ids or inputs_embeds", "pass one of the two")
        embeds_BTD = None
        if inputs_embeds is not None:
            embeds_BTD = self._entering(inputs_embeds)
        elif input_ids is not None and torch.is_grad_enabled() and _trainable(self.get_input_embeddings()):
            embeds_BTD = self.client.head.embed(input_ids, position_ids)
        differentiable = torch.is_grad_enabled() and embeds_BTD is not None and embeds_BTD.requires_grad
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and labels is None and not differentiable
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        cache = past_key_values
        if differentiable:
            if cache is not None:
                raise InputError("gradients do not reach into a cache", "pass the whole text in one call")
            assert embeds_BTD is not None
            nothing_BL = torch.zeros(embeds_BTD.shape[0], 0, dtype=torch.long)
            extras = new_columns(embeds_BTD.shape[:2], nothing_BL, attention_mask, position_ids)
            hidden = remote_blocks(embeds_BTD, self._chains, *extras)
            logits = self._logits(hidden[:, -keep:], logits_to_keep)
        else:
            if cache is None:
                given = input_ids if input_ids is not None else embeds_BTD
                assert given is not None
                cache = self.new_cache(0 if use_cache else given.shape[1])
            here = torch.is_grad_enabled() and _trainable(self.head)
            try:
                logits = self._step(
                    cache, input_ids, embeds_BTD, attention_mask, position_ids, keep, logits_to_keep, here
                )
            finally:
                if past_key_values is None and not use_cache:
                    cache.close()
        loss = None
        if labels is not None:
            vocab_size = self.config.get_text_config().vocab_size
            more = {key: value for key, value in kwargs.items() if key in _LOSS_ARGUMENTS}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **more)
        returned = cache if past_key_values is not None or (use_cache and not differentiable) else None
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=returned)
        return output if return_dict is not False else output.to_tuple()

    def _step(
        self,
        cache: RemoteCache,
        input_ids: torch.Tensor | None,
        embeds_BTD: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        keep: int,
        logits_to_keep: int | torch.Tensor,
        here: bool,
    ) -> torch.Tensor:
        """One step of a session, its logits from the head that sessions share (`here`: from this thread)."""
        if not isinstance(cache, RemoteCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}", "pass the cache that this model returned")
        given = input_ids if input_ids is not None else embeds_BTD
        assert given is not None
        cache.check_rows(given.shape[0])
        mask_BT, positions_BT = new_columns(given.shape[:2], cache.held_mask(), attention_mask, position_ids)
        here = here or not isinstance(logits_to_keep, int)
        output = cache.step(
            ids_BT=input_ids if embeds_BTD is None else None,
            hidden_BTD=embeds_BTD,
            mask_BT=mask_BT,
            positions_BT=positions_BT,
            keep=keep,
            to_logits=not here,
        ).to(self.device)
        return self._logits(output, logits_to_keep) if here else output

    def _entering(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """What enters the first block for embedded tokens. Raises InputError where that is not the embedding alone."""
        if self._plain_embedding is None:
            ids_BT = torch.tensor([[1, 2, 3]])
            with torch.no_grad():
                entering, embedded = self.client.head.embed(ids_BT), self.get_input_embeddings()(ids_BT)
            self._plain_embedding = entering.shape == embedded.shape and torch.equal(entering, embedded)
        if not self._plain_embedding:
            raise InputError(
                f"model type '{self.config.model_type}' changes embeddings before its first block", "give input_ids"
            )
        return inputs_embeds.to(self.dtype)

    def _logits(self, hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        if not isinstance(logits_to_keep, int):
            hidden = slice_logits_to_keep(hidden, logits_to_keep)
        return self.client.head.logits(hidden)

    # What generate() needs to know.

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. In a `session()` block, or with `past_key_values`, an earlier call is continued."""
        cache = kwargs.get("past_key_values") or getattr(self._of_thread, "session", None)
        if isinstance(cache, RemoteCache):
            kwargs["past_key_values"] = cache
            inputs = self._continue(cache, inputs, kwargs)
        made: list[RemoteCache] = []
        outer, self._of_thread.made = getattr(self._of_thread, "made", None), made
        result = None
        try:
            result = super().generate(inputs, *args, **kwargs)
        finally:
            self._of_thread.made = outer
            for own in made:
                if own is not getattr(result, "past_key_values", None):
                    own.close()
        if isinstance(cache, RemoteCache):
            cache.sequences = result if isinstance(result, torch.Tensor) else result.sequences
        return result

    @staticmethod
    def _continue(cache: RemoteCache, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Roll the cache back to what it shares with the inputs; the last answer if there are none."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is None and kwargs.get("inputs_embeds") is not None:
            cache.aligned = True
            return inputs
        if ids is None and cache.sequences is not None:
            ids = inputs = cache.sequences
            held = cache.held_mask()
            if kwargs.get("attention_mask") is None and not bool(held.all()) and len(held) == len(ids):
                more = torch.ones(len(ids), max(0, ids.shape[1] - held.shape[1]), dtype=held.dtype)
                kwargs["attention_mask"] = torch.cat([held, more], dim=1)[:, : ids.shape[1]].to(ids.device)
        if ids is not None:
            cache.align(ids, kwargs.get("attention_mask"))
        return inputs

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"cache_implementation='{generation_config.cache_implementation}' means nothing here: the nodes keep"
                " the cache",
                "leave it out",
            )
        if cache is None:
            if generation_config.use_cache is not False:
                cache = model_kwargs["past_key_values"] = self.new_cache(max_cache_length)
                if getattr(self._of_thread, "made", None) is not None:
                    self._of_thread.made.append(cache)
            return
        if not isinstance(cache, RemoteCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}", "pass the cache that this model returned")
        cache.expected_tokens = max(cache.expected_tokens, max_cache_length)
        spread = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if spread > 1 and cache.batch_size == batch_size:
            cache.batch_repeat_interleave(spread)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> Any:
        cache = kwargs.get("past_key_values")
        first = kwargs.get("is_first_iteration") and next_sequence_length is None
        if first and isinstance(cache, RemoteCache) and cache.aligned and kwargs.get("inputs_embeds") is None:
            # Assisted decoding passes the whole text at first, whatever the cache holds.
            next_sequence_length = input_ids.shape[1] - cache.get_seq_length()
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)

    def get_input_embeddings(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self.head.get_input_embeddings())

    def get_output_embeddings(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self.head.get_output_embeddings())

    def save_pretrained(self, *args: object, **kwargs: object) -> NoReturn:
        raise InputError("the blocks of this model are on other machines", "save what you trained by itself")


def _refuse(output_attentions: bool | None, output_hidden_states: bool | None, kwargs: dict[str, Any]) -> None:
    if output_attentions or output_hidden_states:
        raise InputError("attentions and hidden states of blocks stay on the nodes", "ask for logits only")
    known = _LOSS_ARGUMENTS | _NOTHING_TO_DO
    unknown = sorted(key for key, value in kwargs.items() if value is not None and key not in known)
    if unknown:
        raise InputError(f"forward takes no {', '.join(unknown)}", "leave it out")


def _trainable(module: torch.nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _generation_config(checkpoint: Checkpoint, config: Any) -> Any:
    """The checkpoint's own, or what its configuration says where it has none."""
    folder = checkpoint.source.files(("generation_config.json",))
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(str(folder))
    return GenerationConfig.from_model_config(config)
