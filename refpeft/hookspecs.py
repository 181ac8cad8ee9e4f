"""What a plugin may define. Reading this file is reading what refpeft takes a PEFT method, or a quantizer, to be.

A plugin is one file: a docstring, a frozen dataclass `Config` with defaults, and any of these functions under
`@hookimpl`. An implementation names only the arguments that it wants; what it does not name is not computed (`weight`
of a quantized layer would be dequantized). Which hooks it has is what it can do: without `peft_merge`, `refpeft merge`
refuses it by name.

A method's Config must have `targets`, and may have `exclude` and `layers`: these choose its sites
(refpeft.targets.select). Fields that end in `_pattern` map regular expressions to values for the sites that match
(refpeft.targets.patterned). A ValueError from `__post_init__` reaches the user as a mistake in the options.

The arguments:
    site    refpeft.sites.Site: .name, .kind, .shape, .roles, .index, .tied; sites: the list of those that were chosen
    cfg     the plugin's Config
    rng     refpeft.rng.Stream of this site: .uniform(low, high, shape), .standard_normal(shape), .permutation(n)
    weight  the frozen dense array: linear (out, in), embedding (vocab, dim), norm (dim,)
    original  `weight` before it was quantized, read from the checkpoint again; of a dense layer `weight` itself
    requantize  dense array -> a frozen weight in the form that this site's has: quantized, or dense
    bias    the frozen bias (out,), or None
    x       Tensor (batch, time, in); ids: integer array (batch, time)
    base    the layer below, to be called once: base(x). Keywords stand in for its frozen parts: base(x, bias=p.bias).
            base.weight and base.bias are those parts as constants; base.frozen(x) is x times the weight alone
    p       the site's values by name, p.A: Tensors; in peft_merge and peft_base their arrays
    shared  the values of `peft_shared` by name
    train   None outside of training; otherwise refpeft.sites.Train: .dropout(x, rate), .draw(n), .step
"""

from pluggy import HookimplMarker, HookspecMarker

hookspec = HookspecMarker("refpeft")
hookimpl = HookimplMarker("refpeft")

# ---- a method: what it trains --------------------------------------------------------------------------------------


@hookspec
def peft_params(site, sites, cfg, rng, weight, bias):
    """First values of what is trained at `site`: {name: array}; None leaves the site alone.

    In place of an array, the name of another parameter of this adapter ("model.embed_tokens.weight") makes the two one;
    a refpeft.tensor.Tensor is a constant, kept with the adapter and not trained.
    """


@hookspec
def peft_check_values(site, cfg, p):
    """Raises RefpeftError where constants that came from a file cannot be, such as places outside of a weight."""


@hookspec
def peft_fit(site, cfg, rng, weight, original, requantize):
    """Better first values, from the weights: {name: array} in place of some of `peft_params`, which is called before.

    Not called where a file brings the values, and for `refpeft train --dry-run`, which has no weights.
    """


@hookspec
def peft_base(site, cfg, p, original):
    """The dense weight that takes the place of the frozen one while this is attached; None leaves that.

    It is kept as the frozen one is: quantized, or dense. It is made of `original` and of constants in `p`, so that an
    adapter's file makes the same weight again, on any machine.
    """


@hookspec
def peft_shared(sites, cfg, rng):
    """Values that all sites share: {name: array}, constant; or {name: refpeft.tensor.parameter(array)}, trained."""


@hookspec
def peft_positions(cfg):
    """The position of the first real token, for methods that put keys before it without adding rows."""


@hookspec
def peft_companions(cfg, sites):
    """Other methods that this one brings along, such as biases trained beside it: {plugin name: its options}."""


@hookspec
def peft_check(sites, cfg):
    """Raises RefpeftError where the options do not fit the sites that were chosen, before anything is made."""


# ---- a method: its forward pass, by kind of site ---------------------------------------------------------------------


@hookspec
def peft_linear(x, base, p, cfg, site, sites, shared, train):
    """At a linear layer: x (batch, time, in), gives (batch, time, out)."""


@hookspec
def peft_embedding(ids, base, p, cfg, site, sites, shared, train):
    """At the token embedding: ids (batch, time), gives (batch, time, dim).

    Extra leading rows are virtual tokens. A method that adds them is attached after those that change the rows of text.
    """


@hookspec
def peft_norm(x, base, p, cfg, site, sites, shared, train):
    """At a LayerNorm or RMSNorm."""


@hookspec
def peft_attention(q, k, v, base, p, cfg, site, sites, shared, train):
    """At the attention of one layer, after rotary positions: (batch, heads, time, head_dim), k and v with kv_heads.

    Extra leading keys are seen by every token.
    """


@hookspec
def peft_block(x, base, p, cfg, site, sites, shared, train):
    """Around a sub-layer before its residual is added (`attn_out`, `mlp_out`), or a whole layer (`block_out`)."""


# ---- a method: its results -------------------------------------------------------------------------------------------


@hookspec
def peft_merge(weight, bias, frozen, p, cfg, site, shared):
    """The dense weight with the adapter folded in, or those of {"weight": ..., "bias": ...} that change.

    `weight` and `bias` have in them what was attached before; `frozen` is the weight that base.frozen multiplies with.

    A hook that names neither weight nor bias gives what stands in for them, and is folded in before all others.
    """


# ---- a quantizer -----------------------------------------------------------------------------------------------------


@hookspec
def quant_pack(weight, cfg):
    """Codes and constants of a dense array: {name: array}."""


@hookspec
def quant_unpack(parts, cfg, shape, dtype):
    """The dense array again, from what `quant_pack` gave: the definition of the format."""
