"""Chains of a batch's rows: what a request asks for, rows among others, states by position, drafts, and records."""

import itertools

import numpy as np
import pytest
import torch

from benchmarks import sampler as benchmark
from benchmarks.common import peak_extra_bytes
from tests.samplers.test_chain import DEFINED, parameters_of, random_chain, random_rows, random_settings
from vllm_entropix import ConfigError
from vllm_entropix.distribution import history
from vllm_entropix.records.fields import names as field_names
from vllm_entropix.rows import table
from vllm_entropix.rows.batch import BatchSampler
from vllm_entropix.rows.rows import Rows
from vllm_entropix.rows.text import RowText
from vllm_entropix.samplers import Chain, chained, registry
from vllm_entropix.samplers import chain as chain_module

NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
SERVER = {"sampler": "dry;top_n_sigma;xtc;min_p;temperature", "dry": {"dry_multiplier": 0.8}}


# --- what is asked for ------------------------------------------------------------------------------------------------


def asked(extra_args, **server):
    config = registry.load_server(server or SERVER)
    return registry.parse_request(extra_args, config).chain


def test_the_servers_chain_holds_where_a_request_names_none():
    chain = asked({})
    assert chain.names == ("dry", "top_n_sigma", "xtc", "min_p", "temperature")
    assert chain.values["dry_multiplier"] == 0.8
    assert chain.values["top_n_sigma"] == -1.0  # llama.cpp's default, and not that of the sampler alone
    assert not set(chain.values) & set(NEUTRAL)
    assert asked({"dry_multiplier": 2}).values["dry_multiplier"] == 2
    assert asked({}, sampler="entropix") is None


@pytest.mark.parametrize("server", ["entropix", "min_p", "dry;temperature"])
def test_a_request_names_its_chain(server):
    config = registry.load_server({"sampler": server})
    for text, names in (
        ("dry;xtc", ("dry", "xtc")),
        (["dry", "xtc"], ("dry", "xtc")),
        ("Top-N-Sigma; typical", ("top_n_sigma", "typ_p")),
        ("", ()),
        ("xtc", ("xtc",)),
        ("dry;entropix", ("dry", "entropix")),
    ):
        request = registry.parse_request({"samplers": text}, config)
        assert request.chain.names == names
        assert registry.sampler_of(request, config) == "chain"
    for text in ("min-p", "entropix", "top_n_sigma"):
        assert registry.parse_request({"samplers": text}, config).chain is None
    expected = ("dry", "temperature") if server == "dry;temperature" else chained.DEFAULT
    assert registry.parse_request({"samplers": "chain"}, config).chain.names == expected


def test_a_section_of_the_server_holds_for_its_sampler():
    sections = {"xtc": {"xtc_probability": 0.3}, "top_n_sigma": {"top_n_sigma": 2}, "dynatemp": {"dynatemp_range": 0.5}}
    chain = asked({"samplers": "xtc;top_n_sigma;dynatemp"}, **sections)
    assert (chain.values["xtc_probability"], chain.values["top_n_sigma"], chain.values["dynatemp_range"]) == (0.3, 2, 0.5)
    config = registry.load_server({**SERVER, **sections})
    assert registry.load_server(config.model_dump(mode="json", by_alias=True)) == config
    for name in ("temperature", "top_k", "top_p", "p_less"):  # a request's own fields, or no settings
        assert name not in registry.server_settings().model_fields
    with pytest.raises(ConfigError, match=r"xtc\.xtc_probability is 2, but"):
        registry.load_server({**SERVER, "xtc": {"xtc_probability": 2}})
    with pytest.raises(ConfigError, match="unknown sampler 'nope' in the chain 'dry;nope'"):
        registry.load_server({"sampler": "dry;nope"})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"samplers": "dry;nope"}, "^unknown sampler 'nope' in the chain 'dry;nope'; there are adaptive_p, dry"),
        ({"samplers": "dry;dry"}, "has dry twice"),
        ({"samplers": "mirostat;adaptive_p"}, "can't stand in one chain"),
        ({"samplers": 3}, "^samplers is 3, but"),
        ({"dry_multiplier": -1}, "^dry_multiplier is -1, but"),
        ({"dry_multiplier": True}, "^dry_multiplier is True, but"),
        ({"typ_p": 0.5}, "^typ_p is a setting of typ_p, which isn't in the chain 'dry;top_n_sigma;xtc;min_p;temperature'"),
        ({"temperature": 0.5}, "^'temperature' is a field of the request's own; give it there$"),
        ({"dry_multipler": 1}, "^unknown setting 'dry_multipler'; did you mean 'dry_multiplier'"),
        (
            {"samplers": "entropix", "dry_multiplier": 1},
            "^dry_multiplier is a setting of chains, but this request's sampler is",
        ),
        ({"mirostat": 3}, "^mirostat is 3, but it should be 0, 1 or 2$"),
        ({"entropix_preset": "jax-2024-10"}, "^entropix_preset is a setting of the sampler entropix, but"),
    ],
)
def test_what_a_request_may_not_say(given, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        asked(given)
    assert "\n" not in str(refused.value)


def test_llama_cpps_switches_are_taken():
    assert asked({"mirostat": 2, "mirostat_tau": 3}).names == ("temperature", "mirostat_v2")
    assert asked({"dynatemp_range": 0.5}).names == ("dry", "top_n_sigma", "xtc", "min_p", "dynatemp")
    assert asked({"samplers": "dry;entropix", "entropix_preset": "jax-2024-10"}).names == ("dry", "entropix")


def test_a_body_of_a_client_that_sends_all_it_knows():
    config = registry.load_server(SERVER).model_dump(mode="json", by_alias=True)
    sent = {  # text-generation-webui's, by SillyTavern
        "typical_p": 1,
        "typical": 1,
        "tfs": 1,
        "top_a": 0,
        "epsilon_cutoff": 0,
        "eta_cutoff": 0,
        "mirostat_mode": 0,
        "mirostat_tau": 5,
        "mirostat_eta": 0.1,
        "smoothing_factor": 0,
        "smoothing_curve": 1,
        "nsigma": 0,
        "rep_pen": 1,
        "xtc_threshold": 0.1,
        "xtc_probability": 0.5,
        "dry_allowed_length": 2,
        "dry_multiplier": 0.7,
        "dry_base": 1.75,
        "dry_sequence_breakers": '["\\n", ":"]',
    }
    assert sent.keys() <= chained.request_names()
    given = chained.of_body(sent, {}, config)
    parsed = registry.parse_request(given, config)
    chain = parsed.chain
    assert chain.names == ("dry", "top_n_sigma", "xtc", "min_p", "temperature")
    assert (chain.values["dry_multiplier"], chain.values["xtc_probability"], chain.breakers) == (0.7, 0.5, ("\n", ":"))
    assert registry.parse_request(chained.of_body({**sent, "mirostat_mode": 2}, {}, config), config).chain.names == (
        "temperature",
        "mirostat_v2",
    )
    # What would change something isn't dropped.
    with pytest.raises(ConfigError, match=r"^typical_p is a setting of typ_p, which isn't in the chain"):
        registry.parse_request(chained.of_body({**sent, "typical_p": 0.9, "typical": 0.9}, {}, config), config)
    taken = chained.of_body({"samplers": ["typ_p", "temperature"], "typical_p": 0.9, "xtc_probability": 0}, {}, config)
    assert registry.parse_request(taken, config).chain.values == {"typ_p": 0.9}
    # vLLM's own field penalises repetitions, and not the chain once more.
    penalised = {"rep_pen": 1.1, "repeat_penalty": 1.1, "rep_pen_range": 64}
    assert registry.parse_request(chained.of_body(sent | penalised, {}, config, 1.1), config) == parsed
    with pytest.raises(ConfigError, match=r"^rep_pen is a setting of penalties, which isn't in the chain"):
        registry.parse_request(chained.of_body(sent | penalised, {}, config), config)
    with pytest.raises(ConfigError, match="which is no JSON list of texts"):
        chained.of_body({"dry_sequence_breakers": "[oops"}, {}, config)


# What clients send beside settings of chains: SillyTavern to text-generation-webui, koboldcpp and llama.cpp, and these
# servers' own pages.
OF_OTHERS = (
    *("prompt", "max_new_tokens", "max_tokens_second", "sampler_seed", "skew", "add_bos_token", "dynamic_temperature"),
    *("dynatemp_low", "dynatemp_high", "sampler_priority", "sampler_order", "stopping_strings", "stop_sequence", "max_length"),
    *("max_context_length", "truncation_length", "ban_eos_token", "custom_token_bans", "banned_strings", "banned_tokens"),
    *("api_type", "api_server", "min_keep", "rep_pen_slope", "rep_pen_size", "encoder_repetition_penalty", "penalty_alpha"),
    *(
        "no_repeat_ngram_size",
        "repetition_decay",
        "num_ctx",
        "num_predict",
        "dynatemp_min",
        "dynatemp_max",
        "num_beams",
        "temperature_last",
        "guidance_scale",
        "negative_prompt",
        "grammar_string",
    ),
    *("grammar", "grammar_retain_state", "memory", "genkey", "trim_stop", "use_default_badwordsids", "bypass_eos", "do_sample"),
    *("cfg_scale", "n_predict", "n_keep", "n_probs", "n_indent", "cache_prompt", "id_slot", "t_max_predict_ms", "penalize_nl"),
    *("penalty_prompt", "ignore_eos", "post_sampling_probs", "timings_per_token", "backend_sampling", "preset", "mode"),
    *("character", "instruction_template", "continue_", "seed", "temp", "frmtadsnsp", "quiet", "singleline", "smoothing"),
)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *[("dry_multiplyer", "dry_multiplier"), ("xtc-probability", "xtc_probability"), ("top_nsigma", "top_n_sigma")],
        *[("DRY_base", "dry_base"), ("sampler", "samplers"), ("mirostat_taus", "mirostat_tau")],
    ],
)
def test_what_is_nearly_a_setting_is_no_others(name, meant):
    registry.refuse_misspelt_of_chain([*OF_OTHERS, *registry.names_for_samplers()])
    with pytest.raises(ConfigError, match=f"^unknown setting {name!r}; did you mean {meant!r}\\?$"):
        registry.refuse_misspelt_of_chain([*OF_OTHERS, name])


# --- rows -------------------------------------------------------------------------------------------------------------


class Batch:
    """A batch sampler with a sequence per request, whose texts are lists here.

    Args:
        requests: (chain or single sampler, its settings, temperature, top_p, top_k and min_p of the request).
        drafts: rows per sequence beyond the first, at most.
        server: its sampler.
    """

    def __init__(self, requests, drafts=0, server="entropix"):
        config = registry.server_settings().from_dict({"sampler": server, "trace": {"alternatives": 0}})
        self.batch = BatchSampler(config, len(requests), None, "cpu", drafts, counted=True)
        self.drafts = drafts
        for number, (text, said, base) in enumerate(requests):
            self.batch.add(str(number), self.sequence(config, text, said, base))
        self.slots = self.batch.sequences.slots_of(map(str, range(len(requests))), len(requests))
        self.kept = torch.full((len(requests), 64), -7, dtype=torch.int32)

    def sequence(self, config, text, said, base):
        parsed = registry.parse_request({"samplers": text, **said}, config)
        name = registry.sampler_of(parsed, config)
        own = dict(zip(table.BASE, base, strict=True))
        constants = self.batch.samplers[name].numbers_of_request(parsed, own)
        return table.Sequence(constants, True, True, False, 1, name, base)

    def distributions(self, logits, texts, order=None):
        """Probabilities and records of ``logits [rows, vocab]``, whose texts end with the rows' input tokens.

        A sequence has as many rows as texts, each one token longer than the one before.
        """
        order = range(len(texts)) if order is None else order
        owners, positions, drafts, fed = [], [], [], []
        for sequence in order:
            for draft, text in enumerate(texts[sequence]):
                owners.append(sequence)
                positions.append(len(text) - 1)
                drafts.append(draft)
                fed.append(text[-1])
            first = texts[sequence][0]
            self.kept[sequence, : len(first)] = torch.tensor(first)
        owners, positions, drafts, fed = map(torch.tensor, (owners, positions, drafts, fed))
        text = RowText(self.kept, owners, positions, drafts, fed, torch.arange(len(fed)), int(positions.max()) + 1)
        valid, several = torch.ones(len(fed), dtype=torch.bool), self.drafts > 0
        self.rows = Rows(
            *(torch.from_numpy(self.slots)[owners], self.slots, positions, fed, valid, owners),
            *(drafts if several else None, self.drafts + 1 if several else 1, text),
        )
        written = torch.as_tensor(logits, dtype=torch.float32).clone()
        self.records = self.batch.apply(written, self.rows, None)
        return written.double().exp()

    def drawn(self, tokens, kept=None):
        """The records, now that these tokens were drawn; of a sequence's rows the first ones may be ``kept``."""
        kept = torch.ones(len(tokens), dtype=torch.bool) if kept is None else torch.tensor(kept)
        places = torch.zeros_like(self.rows.batch) if self.rows.draft_index is None else self.rows.draft_index
        token_ids = torch.zeros(len(self.slots), self.drafts + 1, dtype=torch.int64)
        token_ids[self.rows.batch, places] = torch.tensor(tokens)
        self.batch.drawn(token_ids, torch.zeros(len(self.slots), dtype=torch.int64).index_add_(0, self.rows.batch, kept.long()))
        return {name: self.records[:, column + 1] for column, name in enumerate(field_names())}


def base_of(values, vocabulary):
    """temperature, top_p, top_k and min_p as a request has them, which for none are neutral."""
    own = NEUTRAL | {name: values[name] for name in NEUTRAL if name in values}
    return (own["temperature"], own["top_p"], float(own["top_k"] if own["top_k"] > 0 else vocabulary), own["min_p"])


def request_of(names, values):
    """(chain, settings in vllm_xargs) of a chain with values of all its settings."""
    said = {key: value for key, value in parameters_of(names, values).items() if key not in NEUTRAL}
    if "dry_sequence_breakers" in said:
        said["dry_sequence_breakers"] = [list(one) for one in said["dry_sequence_breakers"]]
    return ";".join(names), said


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_what_their_chains_give_alone(seed):
    """Chains of several kinds in one batch, beside single samplers, over several draws and in any order."""
    rng = np.random.default_rng(seed)
    vocabulary, count = int(rng.choice([5, 30, 140])), 4
    chains = [random_chain(rng) for _ in range(count - 1)]
    chains.append(chains[0])
    values = [random_settings(rng) for _ in chains]
    # Chains that read no text of vLLM's own give the same in float32, but where a sum meets a border.
    requests = [(*request_of(*one), base_of(one[1], vocabulary)) for one in zip(chains, values, strict=True)]
    others = [("min_p", {}, (1.0, 1.0, float(vocabulary), 0.1)), ("entropix", {}, (1.0, 1.0, float(vocabulary), 0.0))]
    mixed, alone = Batch([*requests, *others]), Batch(others)
    runs = [
        Chain.parse(names, parameters_of(names, v) if names else {}).begin() for names, v in zip(chains, values, strict=True)
    ]
    texts = [rng.integers(0, min(6, vocabulary), size=rng.integers(1, 14)).tolist() for _ in (*requests, *others)]
    for _ in range(4):
        logits = torch.tensor(random_rows(rng, len(texts), vocabulary), dtype=torch.float32)
        order = rng.permutation(len(texts)).tolist()
        found = mixed.distributions(logits[order], [[text] for text in texts], order)[np.argsort(order)]
        records = mixed.records[np.argsort(order)]
        for row, (run, text) in enumerate(zip(runs, texts, strict=False)):
            expected = run.distribution(logits[[row]], [text])[0].double()
            greedy = values[row].get("temperature") == 0
            if not greedy or any("temp" in name or name == "edt" for name in chains[row]):
                torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-6, msg=f"{chains[row]} {values[row]}")
        expected = alone.distributions(logits[count:], [[text] for text in texts[count:]])
        torch.testing.assert_close(found[count:], expected, rtol=0, atol=0)
        assert (records[:, 0] > 0).all()
        drawn = [int(rng.choice(vocabulary, p=(row / row.sum()).numpy())) for row in found]
        mixed.drawn([drawn[row] for row in order])
        for row, run in enumerate(runs):
            run.advance([drawn[row]])
        for text, token in zip(texts, drawn, strict=True):
            text.append(token)


def test_an_empty_chain_with_neutral_values_is_vllms_own_distribution():
    logits = torch.tensor(random_rows(np.random.default_rng(2), 3, 50), dtype=torch.float32)
    neutral = (1.0, 1.0, 50.0, 0.0)
    batch = Batch([("", {}, neutral), ("chain", {}, neutral), ("min_p;temperature", {}, neutral)])
    found = batch.distributions(logits, [[[1, 2, 1, 2]]] * 3)
    torch.testing.assert_close(found, logits.double().softmax(-1), rtol=1e-5, atol=1e-9)


def test_temperature_0_is_the_best_of_what_a_chain_leaves():
    logits = torch.tensor([[3.0, 2.5, 0.0, -1.0]] * 3)
    greedy = (0.0, 1.0, 4.0, 0.0)
    dry = {"dry_multiplier": 1, "dry_allowed_length": 1}
    batch = Batch([("dry;temperature", dry, greedy), ("dry", dry, greedy), ("temperature", {}, greedy)])
    # After 2 stood 0, so that DRY takes 1 off its logit.
    found = batch.distributions(logits, [[[2, 0, 2]]] * 3)
    assert found.argmax(-1).tolist() == [1, 1, 0]
    assert found.amax(-1).tolist() == [1.0] * 3


def test_chains_that_nobody_has_are_forgotten():
    """Each client may ask for chains of its own, and breakers: those of running sequences alone stay, and a few more."""
    logits, base = torch.tensor([[3.0, 2.5, 0.0, -1.0]] * 2), (1.0, 1.0, 4.0, 0.0)
    dry = {"dry_multiplier": 100, "dry_allowed_length": 1}
    batch = Batch([("dry", {**dry, "dry_sequence_breakers": [3]}, base), ("dry;temperature", dry, base)])
    expected = batch.distributions(logits, [[[2, 0, 2]]] * 2)
    config, chains = batch.batch.samplers["chain"].settings, batch.batch.samplers["chain"]._chains
    for number in range(60):
        text, said = (("dry", {"dry_sequence_breakers": [number]}), ("xtc;top_h", {}))[number % 2]
        batch.batch.add("passing", batch.sequence(config, text, said, base))
        if number % 3:
            batch.batch.remove("passing")
    # The server's own is never forgotten.
    assert len(chains) <= 3 + 1 + 16
    torch.testing.assert_close(batch.distributions(logits, [[[2, 0, 2]]] * 2), expected, rtol=0, atol=0)
    for name in ("0", "1", "passing"):
        batch.batch.remove(name)
    batch.batch.add("again", batch.sequence(config, "", {}, base))
    assert len(chains) <= 1 + 1 + 16
    assert len(chains._holders) == 2


# --- states -----------------------------------------------------------------------------------------------------------

STATES = [
    ("mirostat_v2", {"mirostat_tau": 2.0, "mirostat_eta": 0.8}),
    ("temperature;mirostat", {"mirostat_tau": 2.0, "mirostat_eta": 0.5}),
    ("xtc;adaptive_p", {"xtc_probability": 0.4, "adaptive_target": 0.4, "adaptive_decay": 0.6}),
    ("dry;xtc;mirostat_v2", {"dry_multiplier": 1.5, "dry_allowed_length": 1, "xtc_probability": 0.3, "mirostat_tau": 2.0}),
]


@pytest.mark.parametrize("together", [False, True])
def test_drafts_are_steps_whatever_is_rejected(together):
    """Each sequence verifies up to 3 drafts in a step, keeps some, and goes on: as one that has none of them."""
    rng = np.random.default_rng(3)
    vocabulary, base = 12, (1.0, 1.0, 12.0, 0.0)
    for chains in [STATES] if together else [[one] for one in STATES]:
        batch = Batch([(text, said, base) for text, said in chains], drafts=3)
        runs = [Chain.parse(text, neutral_of(text) | said | without_breakers(text)).begin() for text, said in chains]
        texts = [[1, 2, 1, 2] for _ in chains]
        # The logits are a function of the text, as a model's are.
        weights = torch.tensor(rng.normal(size=(vocabulary, vocabulary)) * 2, dtype=torch.float32)
        for _ in range(8):
            drafts = [rng.integers(0, vocabulary, size=rng.integers(0, 4)).tolist() for _ in chains]
            stages = [[text + draft[:end] for end in range(len(draft) + 1)] for text, draft in zip(texts, drafts, strict=True)]
            logits = torch.stack([weights[text[-1]] for text in itertools.chain(*stages)])
            found = batch.distributions(logits, stages)
            tokens, kept, first = [], [], 0
            for text, draft, run in zip(texts, drafts, runs, strict=True):
                accepted = int(rng.integers(0, len(draft) + 1))
                for place in range(len(draft) + 1):
                    row = found[first + place]
                    if place > accepted:
                        tokens.append(2**45)  # whatever the memory held
                        kept.append(False)
                        continue
                    expected = run.distribution(weights[[text[-1]]], [text])[0].double()
                    torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)
                    token = draft[place] if place < accepted else int(row.argmax())
                    run.advance([token])
                    text.append(token)
                    tokens.append(token)
                    kept.append(True)
                first += len(draft) + 1
            batch.drawn(tokens, kept)


def neutral_of(text):
    return {"temperature": 1.0} if "temperature" in text else {}


def without_breakers(text):
    return {"dry_sequence_breakers": []} if "dry" in text else {}


def test_a_step_that_is_done_again_starts_from_the_same_state():
    """A preempted sequence, or one whose token was thrown away, draws again at the same position."""
    batch, other = (Batch([("mirostat_v2", {"mirostat_tau": 2.0}, (1.0, 1.0, 6.0, 0.0))]) for _ in range(2))
    logits = torch.tensor([[3.0, 2, 1, 0, -1, -2]])
    for token in (1, 2):
        batch.distributions(logits, [[[1, 2]]])
        batch.drawn([token])
    batch.distributions(logits, [[[1, 2]]])
    batch.drawn([1], [False])
    other.distributions(logits, [[[1, 2]]])
    other.drawn([2])
    one, same = (each.distributions(logits, [[[1, 2, 2]]]) for each in (batch, other))
    assert torch.equal(one, same)
    assert batch.drawn([0])["mu"] == other.drawn([0])["mu"] != 4.0


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_record_tells_what_is_known_after_the_draw():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4))
    base = (0.5, 0.9, 4.0, 0.0)
    dry = {"dry_multiplier": 1.5, "dry_allowed_length": 1}
    batch = Batch(
        [
            ("dry;xtc;temperature", {**dry, "xtc_probability": 0.25}, base),
            ("dry", dry, base),
            ("mirostat_v2", {"mirostat_tau": 3}, base),
            ("min_p", {}, base),
        ]
    )
    batch.distributions(logits, [[[2, 0, 2]]] * 4)
    assert torch.isnan(batch.records[:, field_names().index("mu") + 1]).all()
    told = batch.drawn([0, 1, 0, 0])
    assert told["dry_penalty"][:2].tolist() == [1.5, 0.0]
    assert told["xtc_share"][0] == 0.25
    assert told["mu"][2] == 6.0
    for name, rows in (
        ("dry_penalty", [2, 3]),
        ("xtc_share", [1, 2, 3]),
        ("mu", [0, 1, 3]),
        ("adaptive_average", [0, 1, 2, 3]),
    ):
        assert torch.isnan(told[name][rows]).all(), name
    # A request's own numbers where the chain has a sampler that reads them, and neutral ones elsewhere.
    assert told["temperature"].tolist() == [0.5, 1.0, 1.0, 0.5]
    assert told["top_p"].tolist() == pytest.approx([1.0, 1.0, 1.0, 0.9])


@pytest.mark.parametrize(
    ("text", "more"),
    # By the kernel, and by PyTorch, where mirostat allows so much surprise that nothing is dropped.
    [("penalties;dry;xtc;typ_p;temperature", {}), ("dry;xtc;temperature;mirostat_v2", {"mirostat_tau": 100})],
)
def test_what_is_off_in_all_rows_is_passed_over(monkeypatch, text, more):
    """llama.cpp's default chain has most of its samplers off: no text is looked at, and the records tell of nothing."""
    logits = torch.tensor(random_rows(np.random.default_rng(1), 2, 20), dtype=torch.float32)
    batch = Batch([(text, {"dry_multiplier": 0, "xtc_probability": 0, **more}, (0.5, 1.0, 20.0, 0.0))] * 2, server="dry;min_p")
    texts, said = [[[2, 0, 2, 0, 2]]] * 2, []
    monkeypatch.setattr(RowText, "last", lambda *arguments: said.append(arguments))
    monkeypatch.setattr(chain_module.stages()["xtc"], "branches", lambda *arguments: said.append(arguments))
    found = batch.distributions(logits, texts)
    torch.testing.assert_close(found, (logits.double() / 0.5).softmax(-1), rtol=1e-5, atol=1e-9)
    assert not said
    told = batch.drawn([0, 1])
    assert told["dry_penalty"].tolist() == told["xtc_share"].tolist() == [0.0, 0.0]


def test_a_line_tells_the_chain_and_its_settings():
    config = registry.load_server(SERVER)
    part = registry.part(config, {"xtc_probability": 0.5}).model_dump()
    assert (part["name"], part["samplers"]) == ("chain", SERVER["sampler"])
    assert (part["dry_multiplier"], part["xtc_probability"]) == (0.8, 0.5)


# --- the text of rows -------------------------------------------------------------------------------------------------


def test_the_text_of_rows_is_what_was_kept_and_the_drafts():
    kept = torch.tensor([[5, 6, 7, 0, 0], [1, 9, 9, 9, 9]], dtype=torch.int32)
    # The first sequence feeds its third token, and verifies 8 and 9; the second feeds its first.
    text = RowText(
        kept,
        owners=torch.tensor([0, 0, 0, 1]),
        positions=torch.tensor([2, 3, 4, 0]),
        drafts=torch.tensor([0, 1, 2, 0]),
        input_ids=torch.tensor([7, 8, 9, 1]),
        index=torch.arange(4),
        longest=5,
    )
    assert text.last().tolist() == [[-1, -1, 5, 6, 7], [-1, 5, 6, 7, 8], [5, 6, 7, 8, 9], [-1, -1, -1, -1, 1]]
    assert text.last(2).tolist() == [[6, 7], [7, 8], [8, 9], [-1, 1]]
    assert text.last(0).shape == (4, 0)
    assert text.select(torch.tensor([3, 2])).last(3).tolist() == [[-1, -1, 1], [7, 8, 9]]


@pytest.mark.parametrize("together", [1, 20])
def test_long_texts_are_looked_at_some_rows_at_a_time(monkeypatch, together):
    """So the memory that they take meanwhile doesn't grow with the rows: here one row after the other, or two together."""
    said = {"dry_multiplier": 1.5, "dry_allowed_length": 1, "frequency_penalty": 0.5, "repeat_last_n": -1}
    rng = np.random.default_rng(0)
    texts = [[rng.integers(0, 5, size=size).tolist()] for size in (9, 3, 8, 1, 7)]
    logits = torch.tensor(random_rows(rng, len(texts), 5), dtype=torch.float32)
    batch = Batch([("penalties;dry", said, (1.0, 1.0, 5.0, 0.0))] * len(texts))
    expected = batch.distributions(logits, texts)
    assert (expected != batch.distributions(logits, [[text[0][-1:]] for text in texts])).any(dim=-1).sum() > 1
    monkeypatch.setattr(history, "TOGETHER_ON_CPU", together)
    assert len(list(history.parts(torch.empty(len(texts), 9)))) == {1: 5, 20: 3}[together]
    torch.testing.assert_close(batch.distributions(logits, texts), expected, rtol=0, atol=0)


def test_texts_take_a_tenth_of_the_logits_memory_at_most():
    rows, vocabulary = 32, 128256
    asked = benchmark.asked_for("penalties;dry", benchmark.ON | benchmark.ALONE, 1024)
    step = benchmark.step(rows, vocabulary, torch.device("cpu"), asked)
    step.prepare()
    assert peak_extra_bytes(step.actions["chain"], torch.device("cpu")) <= 0.1 * 4 * rows * vocabulary


def test_each_stage_that_looks_at_text_says_how_much_of_it():
    for name in DEFINED:
        stage = Chain.parse(name).stages[0]
        assert stage.needs_tokens == (stage.window is not None)
