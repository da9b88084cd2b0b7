"""What each stage of a chain is, written literally in plain Python, one row and one candidate at a time.

A row is a list of (token id, logit) of what is left. It shares no line with the package.
"""

import math


def softmax(row):
    top = max(logit for _, logit in row)
    weights = [math.exp(logit - top) for _, logit in row]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def entropy(row):
    return math.fsum(-p * math.log(p) for p in softmax(row) if p > 0)


def descending(row):
    return sorted(row, key=lambda one: (-one[1], one[0]))


def best(row):
    return descending(row)[:1]


def scaled(row, temperature):
    return best(row) if temperature <= 0 else [(token, logit / temperature) for token, logit in row]


def kept(row, floor):
    """What is at least so probable, or the best."""
    return [one for one, p in zip(row, softmax(row), strict=True) if p >= floor] or best(row)


def temperature(row, s, _):
    return scaled(row, s["temperature"])


def dynatemp(row, s, _):
    if s["dynatemp_range"] <= 0:
        return scaled(row, s["temperature"])
    if len(row) == 1:
        return row
    low, high = max(0.0, s["temperature"] - s["dynatemp_range"]), s["temperature"] + s["dynatemp_range"]
    return scaled(row, low + (high - low) * (entropy(row) / math.log(len(row))) ** s["dynatemp_exponent"])


def edt(row, s, _):
    if s["edt_theta"] == 0:
        return scaled(row, s["temperature"])
    found = entropy(row)
    return best(row) if found == 0 else scaled(row, s["temperature"] * 0.8 ** (s["edt_theta"] / found))


def top_k(row, s, _):
    return descending(row)[: s["top_k"]] if s["top_k"] > 0 else row


def top_p(row, s, _):
    if s["top_p"] >= 1:
        return row
    ordered, total = descending(row), 0.0
    for number, p in enumerate(softmax(ordered), 1):
        total += p
        if total >= s["top_p"]:
            return ordered[:number]
    return ordered


def min_p(row, s, _):
    return kept(row, s["min_p"] * max(softmax(row)))


def top_n_sigma(row, s, _):
    if s["top_n_sigma"] <= 0:
        return row
    logits = [logit for _, logit in row]
    mean = math.fsum(logits) / len(logits)
    sigma = math.sqrt(math.fsum((logit - mean) ** 2 for logit in logits) / len(logits))
    return [one for one in row if one[1] >= max(logits) - s["top_n_sigma"] * sigma]


def typ_p(row, s, _):
    if s["typ_p"] >= 1:
        return row
    found = entropy(row)
    ordered = sorted((abs(-math.log(p) - found), one[0], p, one) for one, p in zip(row, softmax(row), strict=True))
    total, taken = 0.0, []
    for _, _, p, one in ordered:
        taken.append(one)
        total += p
        if total > s["typ_p"]:
            break
    return taken


def excluded(row, s):
    """XTC with its coin fallen."""
    ordered = descending(row)
    top = sum(p >= s["xtc_threshold"] for p in softmax(ordered))
    return ordered[top - 1 :] if s["xtc_threshold"] <= 0.5 and top >= 2 else row


def longest(tokens, breakers, token):
    """The longest end of the text that stands before an earlier ``token``; None if it isn't there."""
    found = None
    for place in range(1, len(tokens)):
        if tokens[place] != token:
            continue
        length = 0
        while (
            length < place
            and tokens[place - 1 - length] == tokens[-1 - length]
            and not any(tokens[-1 - length] in breaker for breaker in breakers)
        ):
            length += 1
        found = length if found is None else max(found, length)
    return found


def dry(row, s, tokens):
    if s["dry_penalty_last_n"] >= 0:
        tokens = tokens[max(0, len(tokens) - s["dry_penalty_last_n"]) :]
    most = int(88.7228391 / math.log(s["dry_base"])) if s["dry_base"] > 1.000001 else math.inf
    result = []
    for token, logit in row:
        length = longest(tokens, s["dry_sequence_breakers"], token)
        is_breaker = (token,) in s["dry_sequence_breakers"]
        if length is not None and not is_breaker and length >= s["dry_allowed_length"] and s["dry_base"] >= 1:
            logit -= s["dry_multiplier"] * s["dry_base"] ** min(length - s["dry_allowed_length"], most)
        result.append((token, logit))
    return result


def penalties(row, s, tokens):
    last = s["repeat_last_n"]
    tokens = tokens if last < 0 else tokens[max(0, len(tokens) - last) :]
    result = []
    for token, logit in row:
        if count := tokens.count(token):
            logit = logit / s["repeat_penalty"] if logit > 0 else logit * s["repeat_penalty"]
            logit -= count * s["frequency_penalty"] + s["presence_penalty"]
        result.append((token, logit))
    return result


def p_less(row, _, __):
    return kept(row, math.fsum(p * p for p in softmax(row)))


def top_a(row, s, _):
    return kept(row, s["top_a"] * max(softmax(row)) ** 2)


def epsilon(row, s, _):
    return kept(row, s["epsilon_cutoff"])


def eta(row, s, _):
    return kept(row, min(s["eta_cutoff"], math.sqrt(s["eta_cutoff"]) * math.exp(-entropy(row))))


def tfs(row, s, _):
    if s["tfs_z"] >= 1 or len(row) <= 2:
        return row
    ordered = descending(row)
    p = softmax(ordered)
    first = [p[i] - p[i + 1] for i in range(len(p) - 1)]
    second = [abs(first[i] - first[i + 1]) for i in range(len(first) - 1)]
    total = sum(second)
    shares = [one / total for one in second] if total > 1e-6 else [1 / len(second)] * len(second)
    reached = 0.0
    for number, share in enumerate(shares):
        reached += share
        if reached > s["tfs_z"]:
            return ordered[: max(1, number)]
    return ordered


def quadratic(row, s, _):
    factor, curve = s["smoothing_factor"], s["smoothing_curve"]
    if factor == 0:
        return row
    top = max(logit for _, logit in row)
    k, cubic = (3 - curve) / 2, (curve - 1) / 2
    return [(t, -(k * factor * (x - top) ** 2) + cubic * factor * (x - top) ** 3 + top) for t, x in row]


def top_h(row, s, _):
    if s["top_h"] >= 1:
        return row
    ordered, allowed = descending(row), s["top_h"] * entropy(row)
    number = 1
    while number < len(ordered) and entropy(ordered[: number + 1]) <= allowed:
        number += 1
    return ordered[:number]


def greedy_threshold(row, s, _):
    return best(row) if max(softmax(row)) < s["greedy_threshold"] else row


def mirostat(row, s, _, mu, vocabulary):
    ordered = descending(row)
    p = softmax(ordered)
    if len(p) == 1:
        return row
    steps = [(math.log((i + 2) / (i + 1)), math.log(p[i] / p[i + 1])) for i in range(min(99, len(p) - 1))]
    exponent = sum(t * b for t, b in steps) / sum(t * t for t, _ in steps)
    base = (exponent - 1) * 2**mu / (1 - vocabulary ** -(exponent - 1))
    power = math.log(base) / exponent if exponent else math.copysign(math.inf, base - 1)
    return ordered[: max(1, int(math.exp(min(power, 30))))]


def mirostat_v2(row, s, _, mu, __):
    return [one for one, p in zip(row, softmax(row), strict=True) if -math.log2(p) <= mu] or best(row)


def adaptive_p(row, s, _, average, __):
    if s["adaptive_target"] < 0:
        return row
    target = min(1.0, max(0.0, 2 * s["adaptive_target"] - average))
    far = [abs(p - target) / 0.3 for p in softmax(row)]
    return [(token, 5 - 10 * d * d / (1 + d)) for (token, _), d in zip(row, far, strict=True)]


STATEFUL = ("mirostat", "mirostat_v2", "adaptive_p")


def mixed(parts):
    """{token: probability} of several (share, row)."""
    total = {}
    for share, row in parts:
        for (token, _), p in zip(row, softmax(row), strict=True):
            total[token] = total.get(token, 0.0) + share * p
    return total


class Sequence:
    """One sequence under a chain, as a literal loop.

    Args:
        names: of the stages, in the order in which they act.
        settings: of all of them.
    """

    def __init__(self, names, settings):
        self.names, self.settings = names, settings
        self.state = None
        if names and names[-1] in STATEFUL:
            self.state = max(0.0, settings["adaptive_target"]) if names[-1] == "adaptive_p" else 2 * settings["mirostat_tau"]

    def distribution(self, logits, tokens=()):
        s = self.settings
        parts = [(1.0, [(token, logit) for token, logit in enumerate(logits) if logit > -math.inf])]
        for name in self.names:
            before = mixed(parts)
            if name == "xtc":
                pi = s["xtc_probability"]
                parts = [new for share, row in parts for new in ((share * (1 - pi), row), (share * pi, excluded(row, s)))]
            else:
                more = (self.state, len(logits)) if name in STATEFUL else ()
                parts = [(share, globals()[name](row, s, list(tokens), *more)) for share, row in parts]
            if name in STATEFUL:
                self.followed = before if name == "adaptive_p" else mixed(parts)
        found = mixed(parts)
        return [found.get(token, 0.0) for token in range(len(logits))]

    def advance(self, token):
        s = self.settings
        if self.state is not None:
            p = self.followed[token]
            if self.names[-1] == "adaptive_p":
                self.state = s["adaptive_decay"] * self.state + (1 - s["adaptive_decay"]) * p
            else:
                self.state -= s["mirostat_eta"] * (-math.log2(p) - s["mirostat_tau"])
