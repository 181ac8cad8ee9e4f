"""What a plugin may define. Reading this file is reading what refpeft takes a PEFT method, or a quantizer, to be.

A plugin is one file: a docstring, of which listings show the first line and the first arXiv id or address; for a method
a constant FAMILY, one of refpeft.manager.FAMILIES; a frozen dataclass `Config` with defaults; and any of these
functions under `@hookimpl`. An implementation names only the arguments that it wants; what it does not name is not
computed (`weight` of a quantized layer would be dequantized). Which hooks it has is what it can do: without
`peft_merge`, `refpeft merge` refuses it by name.

A method's Config must have `targets`, and may have `exclude` and `layers`: these choose its sites
(refpeft.targets.select). Fields that end in `_pattern` map regular expressions to values for the sites that match
(refpeft.targets.patterned). A ValueError from `__post_init__` reaches the user as a mistake in the options. A triple
("terms", "cayley", "neumann") in the class attribute `only_with` says that the option `terms` does nothing, and is
refused, where `cayley` is not "neumann".

A recipe has no forward hook, and so no targets: it brings other methods along (`peft_companions`).

What every method promises, and `refpeft check FILE` tries on tiny models: the gradients of all that it trains are right
(hooks compute with refpeft.ops on Tensors, and what counts as a constant goes through ops.detach); in a decoder a token
changes nothing before it, and a text nothing in another, in the same row or not; what is attached below acts; merged is
unmerged; on quantized weights it is what it is on the same numbers, dense; all random numbers are drawn from `rng`;
what is drawn or made of weights and not trained is a constant among its values, so that files have it; nothing is read
by the host in a training step; no array is changed in place. Two things are asked if the docstring says them: that
first values "leave the model as it is" (or that "the model is unchanged"), and a formula, "r (in + out) numbers a
target" (or a place, a layer, or "numbers in all"), of options and of the sizes of a site: out and in, vocab and dim,
kv_heads and head_dim.

The arguments:
    site    refpeft.sites.Site: .name, .kind, .shape, .roles, .index, .tied, .quantized
    sites   the list of those that were chosen (a recipe is given all of the model's)
    cfg     the plugin's Config
    rng     refpeft.rng.Stream of this site: .uniform(low, high, shape), .standard_normal(shape), .permutation(n)
    weight  the frozen dense array: linear (out, in), embedding (vocab, dim), norm (dim,)
    original  `weight` before it was quantized, read from the checkpoint again; of a dense layer `weight` itself
    requantize  dense array -> a frozen weight in the form that this site's has: quantized, or dense
    bias    the frozen bias (out,), or None
    tokenizer  the model's refpeft.tokenizer.Tokenizer, or None where it has none
    x       Tensor (batch, time, in); ids: integer array (batch, time). Several texts may share a row: of other tokens
            a hook knows only what attention has. After the last attention, methods that merge get (rows, in)
    base    the layer below, to be called once (a norm's may be again): base(x). Keywords stand in for its frozen parts:
            base(x, bias=p.bias).
            base.weight and base.bias are those parts as constants; base.frozen(x) is x times the weight alone, all of
            base(x) but the bias where base.is_frozen: no method is below, and none stands in for a part;
            base.attention(q, k, v), in a block's hook, is attention such as the layer's own for a sub-network, and
            base.cross_attention(q, source) in T5's decoder attention to the keys and values that source() gives;
            base.scale(q), in an attention's, what its scores are multiplied with, to be handed on where q is widened
    p       the site's values by name, p.A: Tensors in the hooks of the forward pass and in peft_penalty, else arrays
    shared  the values of `peft_shared` by name, likewise
    near    the layers beside an attention or a block, by role: near("k", x) is what the layer's `k` makes of x;
            near.site("k") is its Site, near.has("gate") whether there is one, and near.keys_and_values(x, site)
            what attention would have of rows x
    memo    what the hooks of a method hand on from site to site, upward, within one forward pass: a namespace, empty
            when a pass begins (T5's decoder has what was handed on in its encoder). checkpoint_activations is refused
            with it, since layers would run again without it
    task    which data set of several the rows are of: an array of integers (batch,), one number for all, or None
    behind  how many rows of a block's x stand behind those that this method put there: those of text, and of methods
            attached before it. In cached generation x may have fewer, and then none of them is this method's
    train   None outside of training; otherwise refpeft.layers.Train: .step, .dropout(x, rate), .uniform(like), and
            .draw(n), the same number at every site, or with apart=True one for each
    layers  the list of refpeft.layers.Layer of the method, one a site: .site, .p, .arrays, .grads, .state
"""

from pluggy import HookimplMarker, HookspecMarker

hookspec = HookspecMarker("refpeft")
hookimpl = HookimplMarker("refpeft")

# ---- a method: what it trains --------------------------------------------------------------------------------------


@hookspec
def peft_params(site, sites, cfg, rng, weight, bias, near):
    """First values of what is trained at `site`: {name: array}; None leaves the site alone.

    In place of an array, the name of another parameter of this adapter ("model.embed_tokens.weight") makes the two one;
    a refpeft.tensor.Tensor is a constant, kept with the adapter and not trained.
    """


@hookspec
def peft_check_values(site, cfg, p):
    """Raises RefpeftError where constants that came from a file cannot be, such as places outside of a weight."""


@hookspec
def peft_fit(site, cfg, rng, weight, tokenizer, original, requantize):
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
    """First values of what all sites share: {name: array} is trained, a Tensor a constant, as in `peft_params`."""


@hookspec
def peft_survey(layers, sites, cfg, rng, survey):
    """Values that the data decide, such as which numbers of a weight are trained, found before the first step.

    Gives {site name: {name: array}}, in place of some of `peft_params`, of any shape; None in place of the dict takes
    the method off that site. Or it changes a layer's .arrays in place, and gives nothing. `survey` is a
    refpeft.survey.Survey: .rows, .steps, .gradients, .own_gradients, .inputs, .changes, .trained. Not called where a
    file brings the values.
    """


@hookspec
def peft_positions(cfg, sites):
    """The position of the first real token, for methods that put keys before it without adding rows."""


@hookspec
def peft_companions(cfg, sites):
    """Other methods that this one brings along, such as biases trained beside it: {plugin name: its options}."""


@hookspec
def peft_check(sites, cfg, fit):
    """Raises RefpeftError where the options do not fit the sites that were chosen, before anything is made.

    `fit`: whether first values will be made, and fitted to the weights, and not read from a file.
    """


# ---- a method: its forward pass, by kind of site ---------------------------------------------------------------------


@hookspec
def peft_linear(x, base, p, cfg, site, sites, shared, train, memo, task):
    """At a linear layer: x (batch, time, in), gives (batch, time, out)."""


@hookspec
def peft_embedding(ids, base, p, cfg, site, sites, shared, train, memo, task):
    """At the token embedding: ids (batch, time), gives (batch, time, dim).

    Extra leading rows are virtual tokens. A method that adds them is attached after those that change the rows of text.
    """


@hookspec
def peft_norm(x, base, p, cfg, site, sites, shared, train, memo, task):
    """At a LayerNorm or RMSNorm."""


@hookspec
def peft_attention(q, k, v, base, p, cfg, site, sites, shared, train, memo, task, near):
    """At the attention of one layer, after rotary positions: (batch, heads, time, head_dim), k and v with kv_heads.

    Extra leading keys are seen by every token.
    """


@hookspec
def peft_block(x, base, p, cfg, site, sites, shared, train, memo, task, near, behind):
    """Around a sub-layer before its residual is added (`attn_out`, `mlp_out`), or a whole layer (`block_out`)."""


# ---- a method: in training -------------------------------------------------------------------------------------------


@hookspec
def peft_objective(logits, loss, mean, cfg):
    """What is minimised in place of the mean -log p of the next token: a scalar Tensor.

    logits()   the logits of all supervised positions (positions, vocab), in a forward pass of its own at every call
    loss(z)    the mean -log p that logits say
    mean(e)    the mean of one number a position (positions,), over the batch that the step is for

    One attached method may have it, and not with checkpoint_activations.
    """


@hookspec
def peft_penalty(site, sites, p, cfg, shared, train):
    """A term of the objective for this site, a scalar Tensor, added once a step; evaluation is without it."""


@hookspec
def peft_rates(site, cfg):
    """Learning rates of some of the site's parameters as multiples of the run's: {name: factor}."""


@hookspec
def peft_state(site, cfg, p):
    """Arrays of floats that the method keeps in training: {name: array}; in checkpoints, not in adapters."""


@hookspec
def peft_step(update, layers, cfg, step, total):
    """Around the optimizer's step: `update()` makes it. `step` counts from 0 to `total` - 1.

    A layer's .arrays and .state may be changed in place; .grads are the gradients that the optimizer uses. Nothing may
    be read by the host here.
    """


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
def quant_unpack(parts, cfg, shape, dtype, rows):
    """The dense array again, from what `quant_pack` gave: the definition of the format.

    `rows` is None, or a slice of the rows of a matrix: then these alone are given, with the same bits. A product asks a
    hook that names it for some rows at a time, so that the dense matrix is never there as a whole.
    """


@hookspec
def quant_blocks(parts, cfg):
    """In place of `quant_unpack`, for levels of a code book times a constant a block: refpeft.blockwise.Blocks.

    refpeft makes them dense: whole, some rows, and by a kernel on a GPU. Constants among `parts` that are quantized
    themselves are arrays, or Blocks in turn: they are for the Blocks alone.
    """
