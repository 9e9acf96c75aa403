"""The format's model, once more: straight from its description, one position and head at a time.

Nothing here imports the package; it works on the config and the state dict as they are in the
files.
"""

import math

import torch

T, V, D, H = 10, 19, 16, 4
SITES = "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out"
BASE = {"block_size": T, "vocab_size": V, "n_layer": 2, "n_head": H, "d_model": D,
        "rms_norm": True, "tied_unembed": False}  # fmt: skip
SPARSE = {"afrac": 0.3, "afrac_loctypes": SITES}
CONFIGS = {
    "plain": {},
    "paper": SPARSE | {"d_head": 6, "d_mlp": 40, "sink": True, "enable_bigram_table": True},
    "four places": {"afrac": 0.5},
    "residual places": {"afrac": 0.5, "afrac_loctypes": "resid_post_attn,resid_post_mlp,mlp_in"},
    "everything kept": {"afrac": 1.0, "afrac_loctypes": SITES},
    "sink": {"sink": True},
    "learned bigram": {"enable_bigram_table": True, "learnable_bigram_table": True},
    "tied": {"tied_unembed": True},
    "layer norm": {"rms_norm": False},
    "layer norm without bias": {"rms_norm": False, "ln_bias": False},
    "relu": {"activation_type": "relu", "residual_activation_type": "relu"},
    "no bias": {"bias": False, "d_head": 2},
    "concatenated positions": {"d_pos_emb": 3},
    "sinusoids": {"d_pos_emb": 6, "sinusoidal_cat_pos_emb": True, "rms_norm": False},
    "like csp_yolo2": SPARSE
    | {
        "d_pos_emb": 4,
        "sink": True,
        "enable_bigram_table": True,
        "learnable_bigram_table": True,
    },
    "sinusoids, sparse": SPARSE
    | {"d_pos_emb": 6, "sinusoidal_cat_pos_emb": True, "sink": True, "d_head": 2},
    "all at once": {
        "afrac": 0.4,
        "afrac_loctypes": f"{SITES},resid_post_attn,resid_post_mlp",
        "d_pos_emb": 3,
        "sink": True,
        "enable_bigram_table": True,
        "rms_norm": False,
        "residual_activation_type": "relu",
        "activation_type": "relu",
        "n_mlp": 24,
        "tied_unembed": True,
    },
    "concatenated, sparse": SPARSE | {"d_pos_emb": 4, "sink": True, "n_mlp": 24, "bias": False},
}


def effective(config):
    """The config with the released code's defaults filled in."""
    values = {"n_layer": 12, "n_head": 12, "d_model": 768, "block_size": 1024,
              "vocab_size": 50304, "d_head": None, "bias": True, "ln_bias": True,
              "rms_norm": False, "residual_activation_type": "identity",
              "activation_type": "gelu", "afrac": None,
              "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out", "tied_unembed": True,
              "d_mlp": config.get("n_mlp"), "enable_bigram_table": False,
              "learnable_bigram_table": False, "d_pos_emb": None,
              "sinusoidal_cat_pos_emb": False, "sink": False} | config  # fmt: skip
    values["d_head"] = values["d_head"] or values["d_model"] // values["n_head"]
    values["d_mlp"] = values["d_mlp"] or 4 * values["d_model"]
    values["afrac_loctypes"] = set(values["afrac_loctypes"].split(","))
    if values["afrac"] in (None, 1):
        values["afrac"], values["afrac_loctypes"] = None, set()
    return values


def random_state(config, seed=0):
    """A state dict with every tensor of the format drawn at random, some entries zero."""
    c = effective(config)
    generator = torch.Generator().manual_seed(seed)
    d, heads, d_in = c["d_model"], c["n_head"] * c["d_head"], c["d_model"] + (c["d_pos_emb"] or 0)
    shapes = {"transformer.wte.weight": (c["vocab_size"], d),
              "transformer.wpe.weight": (c["block_size"], c["d_pos_emb"] or d),
              "final_logits_bias": (c["vocab_size"],)}  # fmt: skip
    norms = {"transformer.ln_f": d}
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}"
        linears = {"attn.c_attn": (3 * heads, d_in), "attn.c_proj": (d, heads),
                   "mlp.c_fc": (c["d_mlp"], d_in), "mlp.c_proj": (d, c["d_mlp"])}  # fmt: skip
        for name, shape in linears.items():
            shapes[f"{at}.{name}.weight"] = shape
            if c["bias"]:
                shapes[f"{at}.{name}.bias"] = shape[:1]
        norms |= {f"{at}.ln_1": d, f"{at}.ln_2": d}
        if c["d_pos_emb"]:
            norms |= {f"{at}.ln_p1": c["d_pos_emb"], f"{at}.ln_p2": c["d_pos_emb"]}
        if c["sink"]:
            shapes[f"{at}.attn.attn_imp.sink_logit"] = (c["n_head"],)
    if c["enable_bigram_table"]:
        shapes["bigram_table"] = (c["vocab_size"], c["vocab_size"])
    for name, width in norms.items():
        shapes[f"{name}.weight"] = (width,)
        if not c["rms_norm"] and c["ln_bias"]:
            shapes[f"{name}.bias"] = (width,)
    state = {}
    for name, shape in shapes.items():
        values = 0.5 * torch.randn(shape, generator=generator)
        values[torch.rand(shape, generator=generator) < 0.2] = 0.0
        state[name] = values + 1 if ".ln_" in name and name.endswith("weight") else values
    if c["sinusoidal_cat_pos_emb"]:
        state["transformer.wpe.weight"] = waves(c["block_size"], c["d_pos_emb"])
    untied = 0.5 * torch.randn(c["vocab_size"], d, generator=generator)
    state["lm_head.weight"] = state["transformer.wte.weight"] if c["tied_unembed"] else untied
    return state


def waves(length, width):
    """Sines, then cosines, with periods from 4 to ``length`` in equal ratios."""
    half = width // 2
    ratio = (length / 4) ** (1 / (half - 1))
    rows = []
    for position in range(length):
        angles = [2 * math.pi * position / (4 * ratio**i) for i in range(half)]
        rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    return torch.tensor(rows)


def forward(config, state, tokens):
    """Logits [batch, pos, vocab]."""
    return torch.stack([one_sequence(effective(config), state, row) for row in tokens.tolist()])


def one_sequence(c, state, tokens):
    x = [state["transformer.wte.weight"][token] for token in tokens]
    table = state["transformer.wpe.weight"]
    places = [table[p] for p in range(len(tokens))] if c["d_pos_emb"] else None
    if places is None:
        x = [row + table[p] for p, row in enumerate(x)]
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}"
        for write, out, resid in ((attention, "attn_out", "resid_post_attn"),
                                  (mlp, "mlp_out", "resid_post_mlp")):  # fmt: skip
            deltas = [largest(c, delta, out) for delta in write(c, state, at, x, places)]
            x = [row + delta for row, delta in zip(x, deltas, strict=True)]
            if c["residual_activation_type"] == "relu":
                x = [row.clamp(min=0) for row in x]
            x = [largest(c, row, resid) for row in x]
    rows = []
    for token, row in zip(tokens, x, strict=True):
        logits = state["lm_head.weight"] @ norm(c, state, "transformer.ln_f", row)
        logits = logits + state.get("final_logits_bias", 0)
        if c["enable_bigram_table"]:
            logits = logits + state["bigram_table"][token]
        rows.append(logits)
    return torch.stack(rows)


def attention(c, state, at, x, places):
    reads = read(c, state, at, "1", x, places, "attn_in")
    width, d_head = c["n_head"] * c["d_head"], c["d_head"]
    q, k, v = [], [], []
    for row in reads:
        together = linear(state, f"{at}.attn.c_attn", row)
        q.append(largest(c, together[:width], "attn_q"))
        k.append(largest(c, together[width : 2 * width], "attn_k"))
        v.append(largest(c, together[2 * width :], "attn_v"))
    out = []
    for here in range(len(x)):
        heads = []
        for head in range(c["n_head"]):
            own = slice(head * d_head, (head + 1) * d_head)
            weights = [
                math.exp(float(q[here][own] @ k[there][own]) / math.sqrt(d_head))
                for there in range(here + 1)
            ]
            total = sum(weights)
            if c["sink"]:
                total += math.exp(float(state[f"{at}.attn.attn_imp.sink_logit"][head]))
            heads.append(sum(w / total * v[there][own] for there, w in enumerate(weights)))
        out.append(linear(state, f"{at}.attn.c_proj", torch.cat(heads)))
    return out


def mlp(c, state, at, x, places):
    out = []
    for row in read(c, state, at, "2", x, places, "mlp_in"):
        neurons = linear(state, f"{at}.mlp.c_fc", row)
        if c["activation_type"] == "relu":
            neurons = neurons.clamp(min=0)
        else:
            neurons = neurons * 0.5 * (1 + torch.erf(neurons / math.sqrt(2)))
        out.append(linear(state, f"{at}.mlp.c_proj", largest(c, neurons, "mlp_neuron")))
    return out


def read(c, state, at, which, x, places, site):
    rows = [norm(c, state, f"{at}.ln_{which}", row) for row in x]
    if places is not None:
        beside = [norm(c, state, f"{at}.ln_p{which}", place) for place in places]
        rows = [torch.cat(pair) for pair in zip(rows, beside, strict=True)]
    return [largest(c, row, site) for row in rows]


def linear(state, name, x):
    return state[f"{name}.weight"] @ x + state.get(f"{name}.bias", 0)


def norm(c, state, name, x):
    if c["rms_norm"]:
        x = x / math.sqrt(float((x * x).sum()) / len(x) + 2**-23)
    else:
        x = x - x.sum() / len(x)
        x = x / math.sqrt(float((x * x).sum()) / len(x) + 1e-5)
    return x * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)


def largest(c, x, site):
    if site not in c["afrac_loctypes"]:
        return x
    order = sorted(range(len(x)), key=lambda i: -abs(float(x[i])))
    kept = set(order[: int(c["afrac"] * len(x))])
    return torch.stack([x[i] if i in kept else x[i] * 0 for i in range(len(x))])
