"""Slow, literal statements of the published samplers: fp64, one row at a time, plain Python.

Nothing here uses the package, except for its counter-based random numbers: both sides have to draw the
same ones to be comparable.
"""

from __future__ import annotations

import math

import torch

from dgemma_accel.reference.philox import WORD_SAMPLE, WORD_SELECT, random_words, uniform_from_word


def by_rank(score, positions):
    """Positions from the best score to the worst; ties in reading order."""
    return sorted(positions, key=lambda i: (-score[i], i))


def transfer_counts(n, steps):
    """get_num_transfer_tokens: as even as it goes, the remainder in the first steps."""
    counts = [n // steps] * steps
    for s in range(n % steps):
        counts[s] += 1
    return counts


class View:
    """What one row offers at one step: proposal x0, confidence c, probabilities p [C][V], draws u, masks M."""

    def __init__(self, x, masked, p, x0, c, u, step, steps, start_count, mask_id, memory, given):
        self.x, self.M, self.p, self.x0, self.c, self.u = x, masked, p, x0, c, u
        self.step, self.steps, self.n_start = step, steps, start_count
        self.mask_id, self.memory, self.given = mask_id, memory, given

    def write(self, positions):
        return {i: self.x0[i] for i in positions}

    def count(self):
        total = len(self.x) if self.memory.get("schedule") == "block" else self.n_start
        counts = transfer_counts(total, self.steps)
        return counts[self.step] if self.step < self.steps else 0

    def entropy(self):
        return [float(-sum(q * math.log(q) for q in row if q > 0)) for row in self.p.tolist()]


def low_confidence(v):
    return v.write(by_rank(v.c, v.M)[: v.count()])


def random_order(v):
    return v.write(by_rank(v.u, v.M)[: v.count()])


def margin_of(v):
    top = [sorted(row, reverse=True)[:2] for row in v.p.tolist()]
    return [a - b for a, b in top]


def margin(v):
    return v.write(by_rank(margin_of(v), v.M)[: v.count()])


def sequential(v):
    return v.write(sorted(v.M)[: v.count()])


def sequential_window(v, overwrite=False):
    first = min(v.M)
    window = [i for i in range(first, first + v.count()) if i < len(v.x)]
    return v.write([i for i in window if overwrite or i in v.M])


def threshold(v, tau, m=1):
    order = by_rank(v.c, v.M)
    return v.write([i for r, i in enumerate(order) if r < m or v.c[i] >= tau])


def sglang_threshold(v, tau):
    above = [i for i in v.M if v.c[i] > tau]
    return v.write(above or by_rank(v.c, v.M)[:1])


def entropy_threshold(v, tau):
    order = by_rank([-h for h in v.entropy()], v.M)
    return v.write([i for r, i in enumerate(order) if r == 0 or v.entropy()[i] < tau])


def dynamic(v, tau):
    high = [i for i in v.M if v.c[i] > tau]
    k = v.count()
    return v.write(high if len(high) >= k else by_rank(v.c, v.M)[:k])


def dinfer_threshold(v, tau, slack=1e-5):
    candidates = [i for i in v.M if v.x0[i] != v.mask_id]
    if not candidates:
        return {}
    limit = min(tau, max(v.c[i] for i in candidates) - slack)
    return v.write([i for i in candidates if v.c[i] >= limit])


def factor(v, f, quirk=False):
    order = by_rank(v.c, v.M)
    limits = [-1.0] + [1 - f / (n + 1) for n in range(2, len(order) + 1)]
    if quirk:
        # The published loop: the index of the first failing rank, or of the last rank, and then corrections.
        top = 0
        for top in range(len(order)):
            if v.c[order[top]] < limits[top]:
                break
        if top == 0 or top == len(order) - 1:
            top += 1
        return v.write(order[:top])
    taken = []
    for i, limit in zip(order, limits):
        if v.c[i] < limit:
            break
        taken.append(i)
    return v.write(taken)


def entropy_bounded(v, gamma):
    """SDAR, as intended: inclusive sums below gamma, at least one."""
    entropy = v.entropy()
    order = sorted(v.M, key=lambda i: (entropy[i], i))
    total, k = 0.0, 0
    for i in order:
        total += entropy[i]
        if total >= gamma:
            break
        k += 1
    return v.write(order[: max(1, min(k, len(order)))])


def entropy_bound(v, bound):
    """DiffusionGemma: go on while the entropy of those before is at most the bound."""
    entropy = v.entropy()
    taken, before = [], 0.0
    for i in sorted(v.M, key=lambda i: (entropy[i], i)):
        if before > bound:
            break
        taken.append(i)
        before += entropy[i]
    return v.write(taken)


def dream_share(v, eps=1e-3):
    times = torch.linspace(1, eps, v.steps + 1)
    return float(1 - times[v.step + 1] / times[v.step]) if v.step < v.steps - 1 else 1.0


def dream_count(v):
    if v.step == v.steps - 1:
        return len(v.M)
    times = torch.linspace(1, 1e-3, v.steps + 1)
    return int(torch.tensor(float(len(v.M))) * (1 - times[v.step + 1] / times[v.step]))


def origin(v):
    return v.write([i for i in v.M if v.u[i] < dream_share(v)])


def dream(v, score, alg_temp=None):
    if alg_temp:
        # Drawing k without replacement from softmax(score / alg_temp) is a top-k of Gumbel-noised scores.
        noise = [-math.log(-math.log(u + 0.5 * 2.0**-24)) for u in v.u]
        score = [s / alg_temp + g for s, g in zip(score, noise)]
    return v.write(by_rank(score, v.M)[: dream_count(v)])


def dream_entropy(v, epsilon):
    return dream(v, [sum(q * math.log(q + epsilon) for q in row if q + epsilon > 0) for row in v.p.tolist()])


def runs(positions):
    out = []
    for i in sorted(positions):
        if out and out[-1][-1] == i - 1:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def hierarchy_set(v, positions, tau, low):
    best = {by_rank(v.c, run)[0] for run in runs(positions)}
    return {i for i in best if v.c[i] > low} | {i for i in positions if v.c[i] > tau}


def hierarchy(v, tau, low):
    return v.write(hierarchy_set(v, v.M, tau, low) | {by_rank(v.c, v.M)[0]})


def hierarchy_remask(v, tau, low, rho, given_too=False):
    reopened = [
        i for i in range(len(v.x)) if i not in v.M and v.c[i] < rho and (given_too or i not in v.given)
    ]
    pool = sorted(v.M + reopened)
    taken = hierarchy_set(v, pool, tau, low)
    for i in by_rank(v.c, pool):
        if len(taken) >= len(reopened) + 1:
            break
        taken.add(i)
    return {**{i: v.mask_id for i in reopened}, **v.write(taken)}


def joint_threshold(v, tau, tau_edit, budget):
    """None when the row is finished."""
    out = {}
    if v.M:
        out |= sglang_threshold(v, tau)
    else:
        v.memory["edits"] = v.memory.get("edits", 0) + 1
        if v.memory["edits"] > budget:
            return None
    for i in range(len(v.x)):
        if i not in v.M and i not in v.given and v.x0[i] != v.x[i] and v.c[i] > tau_edit:
            out[i] = v.x0[i]
    return out or None


def with_credit(logits, memory, masked, alpha=0.7, gamma=0.2, beta=0.8):
    """One row's logits [C, V] fp64 with the credit of this step added; the credit is a full table, as published."""
    table = memory.setdefault("credit", torch.zeros_like(logits))
    table *= beta
    p = torch.softmax(logits, -1)
    for i in masked:
        top = first_argmax(logits[i])
        table[i, top] += p[i, top] ** gamma
    return logits + alpha * torch.log(table + 1)


def first_argmax(row):
    return int((row == row.max()).nonzero()[0])


def top_p(logits, p):
    """Sort, cumulate, drop what comes after more than p, per row [V] (no ties across the cut assumed)."""
    order = torch.argsort(logits, descending=True, stable=True)
    cumulated = torch.softmax(logits[order], -1).cumsum(-1)
    out = logits.clone()
    for rank in range(1, len(order)):
        if cumulated[rank - 1] > p:
            out[order[rank]] = -math.inf
    return out


def top_k(logits, k):
    least = logits.sort(descending=True).values[min(k, len(logits)) - 1]
    return torch.where(logits < least, -math.inf, logits)


def filtered(logits, temperature, k=None, p=None, k_first=False):
    x = logits / temperature if temperature else logits
    stages = [lambda x: top_p(x, p) if p else x, lambda x: top_k(x, k) if k else x]
    for stage in reversed(stages) if k_first else stages:
        x = stage(x)
    return x


def draw(x, u):
    """The first token at which the cumulated probability of logits x [V] exceeds u."""
    total = 0.0
    q = torch.softmax(x, -1).tolist()
    for token, mass in enumerate(q):
        total += mass
        if total > u:
            return token
    return max(i for i, mass in enumerate(q) if mass > 0)


def run_block(
    decide,
    model_logits,
    x,
    open_,
    *,
    mask_id,
    steps,
    temperature=0.0,
    confidence="untempered",
    seed,
    offset,
    scheduled,
    limit=None,
    credit=False,
    schedule="masked",
    k=None,
    p=None,
    k_first=False,
    ends=None,
):
    """One block of a batch: rows decide each for itself from the same call of the model.

    model_logits: x [B, C] -> [B, C, V]. Returns (x, evaluations per row, stuck rows, next offset).
    """
    batch, length = x.shape
    x = x.clone()
    given = [[i for i in range(length) if not open_[b, i]] for b in range(batch)]
    memory = [{"schedule": schedule} for _ in range(batch)]
    start = [sum(bool(open_[b, i]) and int(x[b, i]) == mask_id for i in range(length)) for b in range(batch)]
    alive = [n > 0 for n in start]
    nfe, stuck = [0] * batch, [False] * batch
    most = steps if scheduled else (limit if limit is not None else max(start))
    step = 0
    while any(alive):
        logits = model_logits(x).double()
        words = random_words(
            torch.tensor(seed), torch.tensor(offset), torch.arange(batch * length).view(batch, length)
        )
        uniform, select = (
            uniform_from_word(words[WORD_SAMPLE]).tolist(),
            uniform_from_word(words[WORD_SELECT]).tolist(),
        )
        for b in range(batch):
            if not alive[b]:
                continue
            nfe[b] += 1
            row = x[b].tolist()
            masked = [i for i in range(length) if row[i] == mask_id and i not in given[b]]
            if decide in REOPENS_GIVEN:
                masked = [i for i in range(length) if row[i] == mask_id]
            l = with_credit(logits[b], memory[b], masked) if credit else logits[b]
            plain = torch.softmax(l, -1)
            cut = l / temperature if temperature else l
            if k or p:
                cut = torch.stack([filtered(l[i], temperature, k, p, k_first) for i in range(length)])
            drawn_from = torch.softmax(cut, -1)
            x0 = [draw(cut[i], uniform[b][i]) if temperature else first_argmax(l[i]) for i in range(length)]
            dist = plain if confidence == "untempered" else drawn_from
            c = [float(dist[i, x0[i]]) for i in range(length)]
            view = View(
                row, masked, dist, x0, c, select[b], step, steps, start[b], mask_id, memory[b], given[b]
            )
            written = decide(view)
            if written is None:
                alive[b] = False
                stuck[b] = bool(masked)
                continue
            new = [written.get(i, token) for i, token in enumerate(row)]
            left = [
                i
                for i in range(length)
                if new[i] == mask_id and (i not in given[b] or decide in REOPENS_GIVEN)
            ]
            x[b] = torch.tensor(new)
            if not left and not ends:
                alive[b] = False
            elif step + 1 >= most:
                alive[b], stuck[b] = False, bool(left)
            elif new == row and temperature == 0 and not scheduled and not credit:
                # The model would say the same again: published loops without a bound spin here.
                alive[b], stuck[b] = False, bool(left)
        step += 1
        offset += 1
    return x, nfe, stuck, offset


REOPENS_GIVEN = set()
