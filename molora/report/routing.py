"""``python -m molora.report routing``: did the experts specialise?

Writes to ``--out``: ``routing.html``, ``routing.json`` with every number, and the pictures as PNG.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora import cli, provenance
from molora.adapter import load
from molora.config import Config
from molora.config import Data as DataConfig
from molora.data import read_rows, spread
from molora.errors import UserError
from molora.files import write_text
from molora.folders import short_names
from molora.report import page, pictures, statistics
from molora.report.observe import Observation, observe, pieces
from molora.report.page import Section, Text, TextView
from molora.report.pictures import Line, Panel
from molora.routing import by_kind

SIGNIFICANT = 0.05
COPIES = 0.9
"""Cosine between two experts' updates from which they are called copies of one another."""
SHOWN_ROWS, SHOWN_TOKENS = 2, 120
"""Rows of each domain that are shown token by token, and tokens of each."""


def add_command(commands: Any) -> None:
    parser = commands.add_parser("routing", help="did the experts specialise?", description=__doc__)
    parser.add_argument("--model", action="append", required=True, metavar="DIR|HUB",
                        help="a stage's final/, or hub name; repeatable: stages of one shape, in order")  # fmt: skip
    parser.add_argument("--data", action="append", required=True, metavar="DOMAIN=FILE",
                        help="JSONL rows of a domain; repeatable")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("outputs/report"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=64, metavar="N",
                        help="of each file, at even distances (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="tokens of a row (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--permutations", type=int, default=999, metavar="N",
                        help="of the domain labels, for what chance gives (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the permutations (default: %(default)s)")
    cli.add_model_options(parser)
    parser.set_defaults(command=command)


def command(options: argparse.Namespace) -> None:
    """Observe, compute, draw, write. Raises :class:`UserError` for bad input."""
    cli.require_positive(options, "rows", "max_length", "batch_size", "permutations")
    if options.out.is_file():
        raise UserError(f"{options.out}: is a file; --out names a folder")
    files = _files(options.data)
    data = {domain: spread(read_rows(path), options.rows) for domain, path in files.items()}
    seen: dict[str, Observation] = {}
    tokenizer: Any = None
    for name, folder in short_names(options.model).items():
        print(f"{name}: reads {sum(map(len, data.values()))} rows …", flush=True)
        model, tokenizer = load(folder, options.device, options.precision)
        seen[name] = observe(model, tokenizer, data, max_length=options.max_length, batch_size=options.batch_size)
        del model
    numbers = {
        "models": {name: numbers_of(o, options.permutations, options.seed) for name, o in seen.items()},
        "drift": drifts(seen),
        "settings": {k: getattr(options, k) for k in ("rows", "max_length", "permutations", "seed")},
        "provenance": provenance.collect(Config(data=DataConfig(path=list(files.values())))),
    }
    write_text(options.out / "routing.json", json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    made, drawn = _page(seen, numbers, tokenizer)
    for name, (panels, columns) in drawn.items():
        pictures.png(panels, options.out / f"{name}.png", columns=columns, title=name.replace("-", " "))
    page.write(made, options.out / "routing.html")
    print("\n".join(made.lead))
    print(f"written: {options.out / 'routing.html'}, routing.json and {len(drawn)} pictures")


# --- numbers -----------------------------------------------------------------------------------------------------


def numbers_of(o: Observation, permutations: int, seed: int) -> dict[str, Any]:
    """Everything about one model, as plain data; per-router lists are in the order of ``routers``."""
    rows = o.counts_of_rows()
    share = statistics.shares(statistics.sum_by(rows, o.domain_of_row))
    found: dict[str, Any] = {
        "routers": o.names,
        "experts": o.experts,
        "top_k": o.top_k,
        "domains": {
            domain: {
                "rows": int((o.domain_of_row == i).sum()),
                "tokens": o.tokens_of(i),
                "share": share[i].tolist(),
                "entropy_bits": statistics.entropy(share[i]).tolist(),
                "load_balance": statistics.load_balance(share[i], o.probabilities[i]).tolist(),
            }
            for i, domain in enumerate(o.domains)
        },
        "expert_cosines": {name: cosines.tolist() for name, cosines in o.expert_cosines.items()},
    }
    if len(o.domains) > 1:
        information = statistics.mutual_information(share)
        chance = statistics.permuted_information(rows, o.domain_of_row, permutations, seed)
        found["mutual_information"] = {
            "bits": information.tolist(),
            "chance_mean": chance.mean(0).tolist(),
            "chance_95": chance.quantile(0.95, dim=0).tolist(),
            "p": statistics.p_values(information, chance).tolist(),
            "mean_bits": float(information.mean()),
            "mean_p": float(statistics.p_values(information.mean()[None], chance.mean(1, keepdim=True))),
        }
    return found


def drifts(seen: Mapping[str, Observation]) -> dict[str, Any]:
    """What changed from each model to the next one, on the same tokens.

    Raises :class:`UserError` for models that cannot be compared router by router.
    """
    found = {}
    for (earlier, a), (later, b) in zip(list(seen.items()), list(seen.items())[1:], strict=False):
        if (a.names, a.experts, a.top_k) != (b.names, b.experts, b.top_k):
            raise UserError(f"{earlier} and {later} have other routers, experts or top_k; compare stages of one shape")
        if a.answers != b.answers:
            raise UserError(f"{earlier} and {later} have other tokenizers; compare stages of one base")
        weights = [statistics.weight_change(w, v) for w, v in zip(a.router_weights, b.router_weights, strict=True)]
        found[f"{earlier} to {later}"] = {
            "changed_choice": statistics.changed_choice(a.gates, b.gates).tolist(),
            "gates_jensen_shannon_bits": statistics.divergence(a.gates, b.gates).tolist(),
            "weight_relative_change": [change for change, _ in weights],
            "weight_cosine": [cosine for _, cosine in weights],
        }
    return found


# --- words and pictures ------------------------------------------------------------------------------------------


def _page(
    seen: Mapping[str, Observation], numbers: Mapping[str, Any], tokenizer: Any
) -> tuple[page.Page, dict[str, tuple[list[Panel], int]]]:
    """The page, and what becomes a PNG: name -> (panels, columns)."""
    sections: list[Section] = []
    drawn: dict[str, tuple[list[Panel], int]] = {}
    lead: list[str] = []
    for name, o in seen.items():
        of_model = numbers["models"][name]
        many = f"{name}: " if len(seen) > 1 else ""
        file = f"{name.replace('/', '-')}-" if len(seen) > 1 else ""
        lead += [many + line for line in _words(o, of_model)]
        share = {domain: torch.tensor(entry["share"]) for domain, entry in of_model["domains"].items()}
        panels = pictures.share_panels(o.names, share)
        drawn[f"{file}shares"] = panels, len(share) + (len(share) == 2)
        sections.append(Section(
            f"{many}tokens per expert",
            "Share of a domain's choices that went to each expert: a token makes "
            f"{o.top_k} choices, one for each expert that it is sent to. Dotted: all experts equal. "
            "Only tokens of answers count.",
            panels, experts=o.experts,
        ))  # fmt: skip
        if "mutual_information" in of_model:
            panels = _information_panels(o, of_model["mutual_information"])
            drawn[f"{file}information"] = panels, len(panels)
            sections.append(Section(
                f"{many}what the expert tells about the domain",
                "Mutual information between a token's domain and its expert, in bits: plug-in estimate (entropy of the "
                "domains' mean shares less the mean of their entropies), domains weighted equally. Grey: what chance "
                f"gives, up to its 95th percentile, from {numbers['settings']['permutations']} permutations of the "
                f"domain labels among rows (seed {numbers['settings']['seed']}).",
                panels, _information_table(o, of_model),
            ))  # fmt: skip
        panels = _balance_panels(o, of_model)
        drawn[f"{file}balance"] = panels, max(1, len(panels) // 2)
        sections.append(Section(
            f"{many}balance",
            "Load balance: E Σ f P with f an expert's share of the choices and P its mean probability; 1 is balance, "
            f"{o.experts / o.top_k:g} all tokens on the same {o.top_k} experts. Entropy of the shares in bits; all "
            f"experts equal (dotted): {torch.log2(torch.tensor(float(o.experts))):.2f}.",
            panels,
        ))  # fmt: skip
        panels = _cosine_panels(o)
        drawn[f"{file}copies"] = panels, len(panels)
        sections.append(Section(
            f"{many}are experts copies of one another?",
            "Cosine between the weight updates B A of two experts of a projection, as long vectors; computed in rank "
            "space as tr((B_jᵀ B_i)(A_i A_jᵀ)). 1: copies; 0: nothing in common. Mean over pairs, and the pair that is "
            "most alike.",
            panels,
        ))  # fmt: skip
    for title, drift in numbers["drift"].items():
        first = next(iter(seen.values()))
        panels = _drift_panels(first, drift)
        drawn[f"drift-{title.replace('/', '-').replace(' ', '-')}"] = panels, len(panels)
        changed = torch.tensor(drift["changed_choice"])
        sections.append(Section(
            f"router drift, {title}",
            "On the same tokens of both models: share of tokens whose set of chosen experts changed; Jensen-Shannon "
            "divergence between a token's gates before and after, mean over tokens; relative change of the router's "
            "weights (Frobenius norm of the difference over that before).",
            panels,
        ))  # fmt: skip
        lead.append(
            f"{title}: a router sends {float(changed.mean()):.0%} of the tokens to another set of experts than before, "
            f"from {float(changed.min()):.0%} to {float(changed.max()):.0%} between routers."
        )
    origin = numbers["provenance"]
    foot = {"command": " ".join(origin["command"]), "commit": origin["commit"] or "not a checkout"}
    foot |= {"data": ", ".join(f"{path} (sha256 {digest[:12]}…)" for path, digest in origin["data"].items())}
    foot |= {name: version for name, version in origin["packages"].items() if name in ("torch", "transformers")}
    title = f"Routing of {', '.join(seen)}"
    return page.Page(title, lead, sections, _view(seen, numbers, tokenizer), foot), drawn


def _words(o: Observation, numbers: Mapping[str, Any]) -> list[str]:
    domains = numbers["domains"]
    lines = [", ".join(f"{domain}: {e['rows']} rows, {e['tokens']:,} tokens" for domain, e in domains.items()) + "."]
    if "mutual_information" in numbers:
        found = numbers["mutual_information"]
        beyond = sum(p <= SIGNIFICANT for p in found["p"])
        most = max(range(len(o.names)), key=lambda i: found["bits"][i])
        limit = torch.log2(torch.tensor(float(min(len(o.domains), o.experts))))
        lines.append(
            f"{beyond} of {len(o.names)} routers tell the domains apart beyond chance (p ≤ {SIGNIFICANT}; chance alone "
            f"would give {SIGNIFICANT * len(o.names):.0f}); over all of them the domain and the expert share "
            f"{found['mean_bits']:.3f} bits of at most {limit:.2g} (p = {found['mean_p']:.3f}), most at "
            f"{_short(o.names[most])}: {found['bits'][most]:.3f}."
        )
    share = torch.tensor([entry["share"] for entry in domains.values()])
    busiest = float(share.max())
    idle = int((share.amax(0) < 0.02).sum())
    lines.append(
        f"The busiest expert of any router takes {busiest:.0%} of a domain's choices (equal: {1 / o.experts:.0%}, most "
        f"possible: {1 / o.top_k:.0%}); {idle} of {share[0].numel()} experts get less than 2 % in every domain."
    )
    alike = {name: float(statistics.off_diagonal(c).max()) for name, c in o.expert_cosines.items()}
    most_alike = max(alike, key=alike.__getitem__)
    copies = sum(cosine >= COPIES for cosine in alike.values())
    lines.append(
        (f"{copies} projections have experts that are copies of one another" if copies else "No experts are copies of "
         "one another") + f" (cosine ≥ {COPIES}); the two most alike have {alike[most_alike]:.2f}, at "
        f"{_short(most_alike)}."
    )  # fmt: skip
    return lines


def _short(name: str) -> str:
    kind, rows = next(iter(by_kind([name]).items()))
    return f"layer {next(iter(rows))} {kind}"


def _information_panels(o: Observation, found: Mapping[str, list[float]]) -> list[Panel]:
    panels = []
    for kind, rows in by_kind(o.names).items():
        layers, where = list(rows), list(rows.values())
        band = (layers, [0.0] * len(layers), [found["chance_95"][i] for i in where], "chance")
        line = Line("observed", layers, [found["bits"][i] for i in where], marker="o")
        settings = {"band": band, "floor": 0.0}
        panels.append(pictures.lines(kind, [line], x="layer", y="bits", settings=settings))
    return panels


def _information_table(o: Observation, numbers: Mapping[str, Any]) -> page.Table:
    found = numbers["mutual_information"]
    order = sorted(range(len(o.names)), key=lambda i: -found["bits"][i])[:8]
    heading = ["router", "bits", "chance (95 %)", "p"]
    heading += [f"{domain}, experts 0 to {o.experts - 1}" for domain in o.domains]
    rows = []
    for i in order:
        cells = [_short(o.names[i]), f"{found['bits'][i]:.3f}", f"{found['chance_95'][i]:.3f}", f"{found['p'][i]:.3f}"]
        for entry in numbers["domains"].values():
            cells.append(" ".join(f"{100 * share:.0f}" for share in entry["share"][i]) + " %")
        rows.append(cells)
    return page.Table(heading, rows)


def _balance_panels(o: Observation, numbers: Mapping[str, Any]) -> list[Panel]:
    panels = []
    equal = float(torch.log2(torch.tensor(float(o.experts))))
    for key, y, level in (("load_balance", "load balance", 1.0), ("entropy_bits", "entropy, bits", equal)):
        for kind, rows in by_kind(o.names).items():
            series = [
                Line(domain, list(rows), [entry[key][i] for i in rows.values()])
                for domain, entry in numbers["domains"].items()
            ]
            panels.append(pictures.lines(f"{y} · {kind}", series, x="layer", y=y, settings={"level": level}))
    return panels


def _cosine_panels(o: Observation) -> list[Panel]:
    panels, names = [], list(o.expert_cosines)
    for kind, rows in by_kind(names).items():
        pairs = [statistics.off_diagonal(o.expert_cosines[names[i]]) for i in rows.values()]
        series = [
            Line("most alike", list(rows), [float(pair.max()) for pair in pairs]),
            Line("mean", list(rows), [float(pair.mean()) for pair in pairs]),
        ]
        panels.append(pictures.lines(kind, series, x="layer", y="cosine", settings={"level": 0.0}))
    return panels


def _drift_panels(o: Observation, drift: Mapping[str, list[float]]) -> list[Panel]:
    shown = {
        "changed_choice": ("tokens with other experts", "share of tokens"),
        "gates_jensen_shannon_bits": ("divergence of gates", "bits"),
        "weight_relative_change": ("change of router weights", "relative change"),
    }
    return [
        pictures.lines(
            title,
            [Line(kind, list(rows), [drift[key][i] for i in rows.values()]) for kind, rows in by_kind(o.names).items()],
            x="layer",
            y=y,
            settings={"floor": 0.0},
        )
        for key, (title, y) in shown.items()
    ]


def _view(seen: Mapping[str, Observation], numbers: Mapping[str, Any], tokenizer: Any) -> TextView:
    """The first rows of each domain, at first by the router that tells most about the domain."""
    last, o = list(seen.items())[-1]
    leaders = {name: other.gates.argmax(-1) for name, other in seen.items()}
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor([len(a) for a in o.answers]).cumsum(0)])
    texts = []
    for domain, title in enumerate(o.domains):
        for row in (o.domain_of_row == domain).nonzero().flatten().tolist()[:SHOWN_ROWS]:
            tokens = o.answers[row][:SHOWN_TOKENS]
            start = int(starts[row])
            digits = {name: [_digits(found[start + i]) for i in range(len(tokens))] for name, found in leaders.items()}
            added = pieces(tokenizer, tokens)
            prompt = tokenizer.decode(o.prompts[row], skip_special_tokens=True).strip()
            texts.append(Text(title, prompt[-600:], [
                (piece, {name: of_model[i] for name, of_model in digits.items()}) for i, piece in enumerate(added)
            ]))  # fmt: skip
    kinds = by_kind(o.names)
    information = numbers["models"][last].get("mutual_information", {}).get("bits")
    best = information.index(max(information)) if information else 0
    kind, layer = next((k, at) for k, rows in kinds.items() for at, row in rows.items() if row == best)
    return TextView(texts, list(seen), kinds, (last, kind, layer), o.experts)


def _digits(experts: Tensor) -> str:
    return "".join(page.DIGITS[expert] for expert in experts.tolist())


# --- arguments ---------------------------------------------------------------------------------------------------


def _files(arguments: Sequence[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for argument in arguments:
        domain, sign, path = argument.partition("=")
        if not sign or not domain or not path:
            raise UserError(f"--data {argument!r}: write it as DOMAIN=FILE, e.g. maths=data/maths.jsonl")
        if domain in files:
            raise UserError(f"--data: the domain {domain!r} is given twice; put its rows into one file")
        files[domain] = path
    return files
