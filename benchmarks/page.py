"""How long pages of circuits take to open and to redraw, in a headless Chromium.

    python benchmarks/page.py

Needs playwright (in the extra "dev") and a Chromium on the path.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from chromium import launched
from playwright.sync_api import sync_playwright

from tl_sparse.views import CircuitTable, Page, PageCircuit, page_html

SIZES = ((40, 100), (216, 5000), (1000, 20000))
JOINED = (("attn_in", "attn_v", "W_V"), ("attn_v", "attn_out", "W_O"),
          ("mlp_in", "mlp_neuron", "W_in"), ("mlp_neuron", "mlp_out", "W_out"))  # fmt: skip
SITES = ("attn_in", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
LAYERS, D_HEAD = 1, 16


def random_circuit(n_nodes: int, n_edges: int) -> CircuitTable:
    """Random nodes at random sites, and random weights between them."""
    rng = np.random.default_rng(0)
    each = -(-n_nodes // (LAYERS * len(SITES)))
    rows = [(layer, site, channel) for layer in range(LAYERS) for site in SITES
            for channel in rng.choice(8 * each, each, replace=False)][:n_nodes]  # fmt: skip
    nodes = pd.DataFrame(rows, columns=["layer", "site", "channel"])
    heads = nodes["site"] == "attn_v"
    nodes["head"] = (nodes["channel"] // D_HEAD).astype("Int64").where(heads)
    nodes["head_channel"] = (nodes["channel"] % D_HEAD).astype("Int64").where(heads)
    nodes["hook"] = "blocks." + nodes["layer"].astype(str) + "." + nodes["site"]
    pairs = [
        nodes[nodes["site"] == source].merge(nodes[nodes["site"] == target], on="layer")
        .assign(matrix=matrix) for source, target, matrix in JOINED
    ]  # fmt: skip
    edges = pd.concat(pairs).rename(columns={
        "site_x": "source_site", "channel_x": "source", "site_y": "target_site",
        "channel_y": "target",
    })  # fmt: skip
    edges = edges.sample(min(n_edges, len(edges)), random_state=0)
    edges["weight"] = rng.normal(size=len(edges))
    return CircuitTable(f"{len(nodes)} nodes", nodes, edges)


def main() -> None:
    """Print a row a size."""
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = launched(playwright)
        print("| nodes | edges | written, s | page, kB | opened and drawn, ms | the page's "
              "own work, ms | redrawn, ms |")  # fmt: skip
        print("|---|---|---|---|---|---|---|")
        for size in SIZES:
            circuit = random_circuit(*size)
            started = time.perf_counter()
            html = page_html(Page("", circuits=(PageCircuit(circuit, "circuit"),)))
            written = time.perf_counter() - started
            file = Path(folder) / "page.html"
            file.write_text(html, encoding="utf-8")
            opened, own, redrawn = [], [], []
            for _ in range(5):
                page = browser.new_page(viewport={"width": 1400, "height": 900})
                tools = page.context.new_cdp_session(page)
                tools.send("Performance.enable", {"timeDomain": "threadTicks"})
                page.goto(file.as_uri())
                page.wait_for_selector(".drawing[data-drawn]")
                opened.append(page.evaluate("performance.now()"))
                metrics = tools.send("Performance.getMetrics")["metrics"]
                own += [1000 * m["value"] for m in metrics if m["name"] == "TaskDuration"]
                for _ in range(4):
                    page.locator(".zoom button").nth(1).click()
                    page.wait_for_timeout(60)
                    redrawn.append(float(page.locator(".drawing").get_attribute("data-drawn")))
                page.close()
            numbers = f"{written:.2f} | {len(html) // 1000} | {statistics.median(opened):.0f} | "
            numbers += f"{statistics.median(own):.0f} | "
            print(f"| {circuit.n_nodes} | {circuit.n_edges:,} | {numbers}"
                  f"{statistics.median(redrawn):.0f} |")  # fmt: skip
        browser.close()


if __name__ == "__main__":
    main()
