"""What do narrow weights give, and what do they cost?

Everything on SmolLM2-135M in one process: (1) all linear layers of its 30 blocks, once, at several numbers of
rows, for float32, float32 with our product for few rows, bfloat16, int8 and int4; (2) greedy decoding with the whole
model, its linear layers (and in `+head` the LM head) replaced, against the same model in float32; (3) the
distance to float32: mean KL(float32 || narrow) a token and the ratio of perplexities over movie reviews, in
chunks of 512 tokens, and once more one token at a time, since kernels differ by rows.

Ways take turns, so other work on the machine hits all alike; of (1) the least time of each counts, of (2)
the median over the rounds of the ratio to float32 in the same round.

This checkpoint was published in 4 bits with groups of 32, which int4 fits again without loss: that says nothing
about other models. So int4 is also judged on weights that noise of one step (uniform, ± half) has made
unlike any 4-bit grid: `quality_fresh`, where both sides have the noise.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from typing import Annotated, Any, cast

import torch
import typer
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.provenance import Spread, provenance, publish, spread
from swarm.logs import configure
from swarm.model.arena import Arena
from swarm.model.few_rows import try_few_rows, use_few_rows
from swarm.model.quantize import GROUP, SCHEMES, QuantizedLinear, Scheme, plan_of, quantize_weight, replace_linears
from swarm.samples import movie_sentences, smollm2_folder

ROWS = (1, 2, 4, 8, 16, 128, 512)
CHUNK = 512
_LARGE_ROWS = 64
_HEAD = "lm_head"
_SCHEMES: tuple[Scheme, ...] = ("int8", "int4")


def main(
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    tokens: Annotated[int, typer.Option(min=8, help="Decoded a round and way.")] = 24,
    rounds: Annotated[int, typer.Option(min=2)] = 6,
    chunks: Annotated[int, typer.Option(min=2, help="Of 512 tokens, scored for quality.")] = 8,
    json_to: Annotated[str, typer.Option("--json", help="Write the result to this file; -: to stdout.")] = "",
    save: Annotated[bool, typer.Option("--save", help="Keep the result in benchmarks/results.")] = False,
) -> None:
    """Time and judge narrow weights."""
    configure("warning", role="benchmark")  # stdout belongs to the result
    origin = provenance(threads)
    torch.set_num_threads(threads)
    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    arena = Arena()
    for parameter in exact.parameters():
        parameter.data = arena.place(parameter.data)
    text = "\n".join(sample.text for sample in movie_sentences("held_out", 60 * chunks))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    ids_NT = ids[: chunks * CHUNK].view(chunks, CHUNK)
    models = {"float32": exact, "few_rows": _few_rows(exact), "bfloat16": copy.deepcopy(exact).to(torch.bfloat16)}
    for scheme in _SCHEMES:
        models[scheme] = narrow(exact, scheme)
        models[f"{scheme}+head"] = _with_head(models[scheme])
    trial = try_few_rows(exact)
    with torch.inference_mode():
        linear_ms = _time_linears({name: models[name] for name in ("float32", "few_rows", "bfloat16", "int8", "int4")})
        decoding = _time_decoding(models, ids_NT[0, :64].unsqueeze(0), tokens, rounds)
        judged = {name: models[name] for name in ("bfloat16", "int8", "int8+head", "int4")}
        quality = _quality(exact, judged, ids_NT)
        one_by_one = {name: _quality_one_by_one(exact, models[name], ids_NT[:2, :128]) for name in ("int8", "int4")}
        del models, judged
        fresh = _with_noise(exact)
        quality_fresh = _quality(fresh, {name: narrow(fresh, name) for name in _SCHEMES}, ids_NT)
    result = {
        "int8_ratio": decoding["ratio"]["int8"].median,
        "int8_head_ratio": decoding["ratio"]["int8+head"].median,
        "int8_kl": quality["int8"]["kl"].median,
        "linear_ms": linear_ms,
        "few_rows": None if trial is None else {**vars(trial), "pays": trial.pays},
        **decoding,
        "quality": quality,
        "quality_one_by_one": one_by_one,
        "quality_fresh": quality_fresh,
        "quality_tokens": ids_NT.numel(),
        "block_bytes": _block_bytes(exact),
        "rounds": rounds,
    }
    publish("quantized", result, origin, json_to, save)


def narrow(exact: nn.Module, scheme: Scheme) -> nn.Module:
    """A copy of the model that shares all but the linear layers of the blocks."""
    model = _sharing_copy(exact)
    weights = {
        path: quantize_weight(cast(nn.Linear, exact.get_submodule(path)).weight, scheme)
        for path in plan_of(model, scheme).narrowed
        if path != _HEAD
    }
    replace_linears(model, weights, torch.float32)
    return model


def _with_head(model: nn.Module) -> nn.Module:
    """The LM head as int8; the embedding, which is the same weight, stays as it is."""
    model = _sharing_copy(model)
    weight = cast(nn.Linear, model.get_submodule(_HEAD)).weight
    replace_linears(model, {_HEAD: quantize_weight(weight, "int8")}, torch.float32)
    return model


def _few_rows(exact: nn.Module) -> nn.Module:
    model = _sharing_copy(exact)
    use_few_rows(model)
    return model


def _with_noise(exact: nn.Module) -> nn.Module:
    """Every linear layer of the blocks with uniform noise of one 4-bit step of its group."""
    model, generator = copy.deepcopy(exact), torch.Generator().manual_seed(0)
    for path in plan_of(exact, "int4").narrowed:
        if path != _HEAD:
            weight = cast(nn.Linear, model.get_submodule(path)).weight
            groups = weight.view(weight.shape[0], -1, GROUP)
            step = (groups.amax(dim=-1, keepdim=True) - groups.amin(dim=-1, keepdim=True)) / 15
            groups.add_((torch.rand(groups.shape, generator=generator) - 0.5) * step)
    return model


def _sharing_copy(model: nn.Module) -> nn.Module:
    shared: list[object] = [*model.parameters()]
    shared += [module.quantized for module in model.modules() if isinstance(module, QuantizedLinear)]
    return copy.deepcopy(model, {id(each): each for each in shared})


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != _HEAD]


def _time_linears(models: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Least milliseconds for all of the blocks' linear layers, by way and rows."""
    linears = {name: _linears(model) for name, model in models.items()}
    best_s: dict[str, dict[str, float]] = {name: {} for name in models}
    for rows in ROWS:
        for _ in range(9 if rows < _LARGE_ROWS else 2):
            for name, layers in linears.items():
                dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
                inputs = {size: torch.randn(rows, size).to(dtype) for size in {m.in_features for m in layers}}
                began = time.perf_counter()
                for layer in layers:
                    layer(inputs[layer.in_features])
                took_s = time.perf_counter() - began
                best_s[name][str(rows)] = min(took_s, best_s[name].get(str(rows), took_s))
    return {name: {rows: round(1000 * s, 2) for rows, s in times.items()} for name, times in best_s.items()}


def _time_decoding(
    models: dict[str, nn.Module], prompt_1T: torch.Tensor, tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Tokens a second of greedy decoding; every way decodes the tokens that it finds likeliest."""
    tok_s: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        order = list(models)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            model = models[name]
            output = model(input_ids=prompt_1T, use_cache=True, logits_to_keep=1)
            began = time.perf_counter()
            for _ in range(tokens):
                next_11 = output.logits[:, -1:].argmax(dim=-1)
                output = model(input_ids=next_11, past_key_values=output.past_key_values, use_cache=True)
            if turn:  # the first is a warm-up
                tok_s[name].append(tokens / (time.perf_counter() - began))
    ratio = {
        name: spread([one / base for one, base in zip(speeds, tok_s["float32"], strict=True)])
        for name, speeds in tok_s.items()
        if name != "float32"
    }
    return {"ratio": ratio, "tok_s": {name: spread(speeds) for name, speeds in tok_s.items()}}


def _quality(exact: nn.Module, others: dict[str, nn.Module], ids_NT: torch.Tensor) -> dict[str, dict[str, Any]]:
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in others}
    for ids in ids_NT:
        expected = _log_probabilities(exact, ids)
        for name, other in others.items():
            found[name].append(_distance(expected, _log_probabilities(other, ids), ids))
    return {name: _compare(distances) for name, distances in found.items()}


def _quality_one_by_one(exact: nn.Module, other: nn.Module, ids_NT: torch.Tensor) -> dict[str, Any]:
    """The narrow side through its kernel for one row, with a cache."""
    found = []
    for ids in ids_NT:
        cache, tables = None, []
        for token in ids:
            output = other(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tables.append(output.logits[0].float().log_softmax(dim=-1))
        found.append(_distance(_log_probabilities(exact, ids), torch.cat(tables), ids))
    return _compare(found) | {"tokens": ids_NT.numel()}


def _log_probabilities(model: nn.Module, ids_T: torch.Tensor) -> torch.Tensor:
    logits_TV = model(input_ids=ids_T.unsqueeze(0), use_cache=False).logits[0]
    return cast(torch.Tensor, logits_TV.float().log_softmax(dim=-1))


def _distance(exact_TV: torch.Tensor, other_TV: torch.Tensor, ids_T: torch.Tensor) -> tuple[float, float]:
    """KL a token, and how much more the next token costs (nats)."""
    kl = functional.kl_div(other_TV, exact_TV, reduction="sum", log_target=True) / len(ids_T)
    next_T1 = ids_T[1:].unsqueeze(1)
    loss = (exact_TV[:-1].gather(1, next_T1) - other_TV[:-1].gather(1, next_T1)).mean()
    return float(kl), float(loss)


def _compare(found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    kl: Spread = spread([kl for kl, _ in found], digits=6)
    mean_loss = sum(loss for _, loss in found) / len(found)
    return {
        "kl": kl,
        "kl_mean": round(sum(kl for kl, _ in found) / len(found), 6),
        "perplexity_ratio": round(math.exp(mean_loss), 5),
    }


def _block_bytes(exact: nn.Module) -> dict[str, int]:
    """Of one block, by scheme; without one, in float32."""
    block = cast(nn.ModuleList, exact.get_submodule("model.layers"))[0]
    return {scheme: plan_of(block, scheme).nbytes(block, torch.float32) for scheme in SCHEMES}


if __name__ == "__main__":
    typer.run(main)
