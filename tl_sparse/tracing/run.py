"""One forward pass of a spliced model, with the graph from which everything is traced."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_sparse.ablation import FwdHook
from tl_sparse.ablation.eval_mode import frozen
from tl_sparse.tasks.padding import real_positions
from tl_sparse.tracing.active import Features, as_is, read_features, write_features
from tl_sparse.tracing.biases import bias_hooks, measured_biases, mlp_hooks, plain_mlps
from tl_sparse.tracing.functions import AnyDictionary
from tl_sparse.tracing.gate import Candidates, Gate, GateState, chosen, gated
from tl_sparse.tracing.splice import Splice, keep_in
from tl_sparse.tracing.spliced_run import Leaf, LeafKind, Site, SplicedRun

_QK = re.compile(r"\.attn\.hook_(rot_)?[qk]$")


def run(
    splice: Splice,
    tokens: Int[Tensor, "prompt pos"],
    last: Int[Tensor, " prompt"],
    gate: Gate | None = None,
    points: Collection[str] = (),
    biases: bool | None = None,
) -> SplicedRun:
    """Run the spliced model once.

    Args:
        splice: The model and its dictionaries.
        tokens: The prompts, padded on the right.
        last: Where each one's last token is; features of padding are left out.
        gate: What stops gradients; nothing by default.
        points: Hooks whose activations are kept, with their graph.
        biases: Whether biases are leaves; by default if the splice is strict.

    Raises:
        ValueError: a hook of the model did not fire, or biases have no part of their own.
    """
    gate = Gate.off() if gate is None else gate
    real = real_positions(tokens.shape[1], last)
    dtype = next(p.dtype for p in splice.model.parameters() if p.is_floating_point())
    tau = torch.full((len(tokens),), gate.tau, device=tokens.device, dtype=dtype)
    found = SplicedRun(splice, tokens, last, GateState(gate, tau))
    biases = splice.strict if biases is None else biases
    taps = [*bias_hooks(splice), *filter(_QK.search, points)] if biases else []
    hooks = _Hooks(found, real, points, taps).all()
    model: Any = splice.model
    with torch.enable_grad(), frozen(model):
        logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=hooks)
    found.logits = uncapped(logits, model.cfg) if splice.freeze.softcap else logits
    if silent := [name for name in splice.sites if name not in found.sites]:
        raise ValueError(f"the hooks of dictionaries {', '.join(silent)} never fired")
    if biases:
        add_biases(found, taps)
    return found


def uncapped(logits: Float[Tensor, "..."], cfg: Any) -> Float[Tensor, "..."]:
    """Logits as they were before a soft cap, cap · tanh(x / cap), if the model has one."""
    cap = getattr(cfg, "output_logits_soft_cap", -1.0) or -1.0
    return logits if cap <= 0 else torch.atanh(logits / cap) * cap


def add_biases(found: SplicedRun, taps: Sequence[str]) -> None:
    """Make biases leaves: the model's, as measured, and the dictionaries' own."""
    splice = found.splice
    behind = {name: x for name, x in found._inputs.items() if name.endswith("hook_scale")}
    # without norms behind sublayers and rotations biases are the same at every token
    asked = [name for name in taps if _QK.search(name)]
    tokens = found.tokens if behind or asked else found.tokens[:1, :1]
    values, logits = measured_biases(splice, tokens, behind, asked)
    for name in taps:
        found.leaves.append(Leaf("bias", name, found.points[name], values[name]))
    if splice.freeze.softcap:
        logits = uncapped(logits, splice.model.cfg)
    found.leaves.append(Leaf("bias", "logits", found.logits, logits))
    real = real_positions(found.tokens.shape[1], found.last)
    for name, site in found.sites.items():
        features = site.features
        if not site.first:  # what is no sum has no bias in it
            at = Leaf("bias", name, features.before, features.bias, features.active)
            found.leaves.append(at)
        error = next(x for x in found.leaves if x.kind == "error" and x.name == name)
        value = site.dictionary.b_dec / features.out_factor.detach()
        found.leaves.append(Leaf("bias", name, error.at, real[..., None] * value))


def check_fits(
    dictionary: AnyDictionary, x_in: Float[Tensor, "..."], x_out: Float[Tensor, "..."]
) -> None:
    """ValueError if a dictionary is not of the width or type of what it reads and writes."""
    ends = ((dictionary.hook_in, x_in, dictionary.d_in),
            (dictionary.hook_out, x_out, dictionary.W_dec.shape[1]))  # fmt: skip
    for hook, x, width in ends:
        if x.shape[-1] != width:
            raise ValueError(
                f"dictionary {dictionary.name}: {hook} has {x.shape[-1]} channels, not {width}"
            )
        if x.dtype != dictionary.W_dec.dtype or x.device != dictionary.W_dec.device:
            raise ValueError(
                f"dictionary {dictionary.name} is {dictionary.W_dec.dtype} on "
                f"{dictionary.W_dec.device}, and {hook} {x.dtype} on {x.device}: "
                f"dictionary.to(device, dtype)"
            )


class _Hooks:
    """The hooks of one run, one function for each hook point."""

    def __init__(
        self, found: SplicedRun, real: Tensor, points: Collection[str], taps: Collection[str]
    ) -> None:
        self.found, self.splice, self.real = found, found.splice, real
        self.points, self.taps = set(points), set(taps)
        self.names: Any = self.splice.model.hook_dict
        self.steps: dict[str, list[Any]] = {}

    def all(self) -> list[FwdHook]:
        """Hooks in the order in which what they do at one point has to be done."""
        for name in sorted(self.points | self.taps):
            self._add(name, self._keep(name))
        for dictionary in self.splice.dictionaries:
            if dictionary.transcoder:
                self._add(dictionary.hook_in, self._remember(dictionary.hook_in))
        self._freezes()
        self._leaves()
        for dictionary in self.splice.dictionaries:
            self._add(dictionary.hook_out, self._spliced(dictionary))
        return [(name, _chain(steps)) for name, steps in self.steps.items()]

    def _add(self, name: str, step: Any) -> None:
        if name not in self.names:
            raise ValueError(f"the model has no hook {name!r}")
        self.steps.setdefault(name, []).append(step)

    def _remember(self, name: str) -> Any:
        return keep_in(self.found._inputs, name)[1]

    def _keep(self, name: str) -> Any:
        def step(x: Tensor) -> Tensor:
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            self.found.points[name] = x
            return x

        return step

    def _freezes(self) -> None:
        freeze = self.splice.freeze
        for name in self.names:
            if name.endswith("hook_scale"):
                of_qk = ".q_norm." in name or ".k_norm." in name
                if freeze.qk_norm if of_qk else freeze.norm:
                    self._add(name, torch.Tensor.detach)
                if "_post.hook_scale" in name:
                    self._add(name, self._remember(name))
        for layer in range(self.splice.n_layers):
            scores = f"blocks.{layer}.attn.hook_attn_scores"
            pattern = f"blocks.{layer}.attn.hook_pattern"
            if self.splice.score_nodes:
                self._add(scores, self._score_gate(f"{layer}.scores"))
            elif freeze.pattern and pattern in self.names:
                self._add(pattern, torch.Tensor.detach)

    def _leaves(self) -> None:
        covered = {dictionary.hook_out for dictionary in self.splice.dictionaries}
        leaves: list[tuple[LeafKind, str, str]] = [
            ("position", "hook_pos_embed", "position"),
            ("position", "hook_pos_concat", "position"), ("token", "hook_bigram", "bigram"),
        ]  # fmt: skip
        if "hook_embed" not in covered:
            leaves.append(("token", "hook_embed", "token"))
        for kind, hook, name in leaves:
            if hook in self.names:
                self._add(hook, self._leaf(kind, name))
        for layer in plain_mlps(self.splice):
            if self.splice.mlp == "error":
                self._add(mlp_hooks(layer)[2], self._leaf("error", f"{layer}.mlp"))
            elif self.splice.mlp == "ratio":
                self._ratio(layer)

    def _ratio(self, layer: int) -> None:
        pre, post, _ = mlp_hooks(layer)
        self._add(pre, self._remember(pre))

        def step(x: Tensor) -> Tensor:
            before = self.found._inputs[pre]
            ratio = torch.where(before == 0, 0, x / torch.where(before == 0, 1, before))
            return as_is(x, before * ratio.detach())

        self._add(post, step)

    def _leaf(self, kind: LeafKind, name: str) -> Any:
        def step(x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            self.found.leaves.append(Leaf(kind, name, x, x.detach()))
            return x

        return step

    def _spliced(self, dictionary: AnyDictionary) -> Any:
        found = self.found

        def step(x: Tensor) -> Tensor:
            shape = x.shape
            x = x.flatten(2)
            x_in = x
            if dictionary.transcoder:
                if dictionary.hook_in not in found._inputs:
                    raise ValueError(
                        f"dictionary {dictionary.name}: {dictionary.hook_in} did not fire before "
                        f"{dictionary.hook_out}"
                    )
                x_in = found._inputs[dictionary.hook_in].flatten(2)
            check_fits(dictionary, x_in, x)
            if first := not x_in.requires_grad:
                x_in = x_in.detach().requires_grad_()
            features = read_features(
                dictionary, x_in, x, self.real, self.splice.freeze.dictionary_norm
            )
            nodes = self._candidates(dictionary.name, features)
            after = gated(features.before, dictionary.name, nodes, found.state)
            written = write_features(dictionary, after, features.active)
            parts = [written] if features.skip is None else [written, features.skip]
            parts.append(dictionary.b_dec / features.out_factor * self.real[..., None])
            error = (x - torch.stack(parts).sum(0)).detach().requires_grad_()
            found.sites[dictionary.name] = Site(dictionary, features, after, nodes, first)
            found.leaves.append(Leaf("error", dictionary.name, error, error.detach()))
            return as_is(x, *parts, error).view(shape)

        return step

    def _candidates(self, site: str, features: Features) -> Candidates:
        active, gate = features.active, self.found.state.gate
        always, never = (
            chosen(names, site, active.pos, active.feature) for names in (gate.protect, gate.ban)
        )
        return Candidates(active.prompt, features.before.detach(), always, never)

    def _score_gate(self, site: str) -> Any:
        def step(x: Tensor) -> Tensor:
            values = x.detach()
            seen = values.isfinite() & (values > -1e4)
            centre = torch.zeros_like(values[..., :1])
            if not self.splice.raw_scores:
                weights = values.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
                centre = (weights * torch.where(seen, values, 0)).sum(-1, keepdim=True)
            values = torch.where(seen, values - centre, 0)
            prompt = torch.arange(len(x), device=x.device)
            nodes = Candidates(prompt.repeat_interleave(x[0].numel()), values.flatten())
            behind = gated(x, site, nodes, self.found.state)
            self.found.scores[site] = (behind, nodes)
            return behind

        return step


def _chain(steps: Sequence[Any]) -> Any:
    def hook_function(x: Tensor, hook: Any = None) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return hook_function
