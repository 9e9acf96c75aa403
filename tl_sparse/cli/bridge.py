"""The command about bridges between a dense and a sparse model: bridge."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from transformers import PreTrainedTokenizerFast

from tl_sparse.bridges import (
    BridgedPair,
    Bridges,
    BridgesConfig,
    BridgeTrainingConfig,
    fit_bridges,
    path_table,
    reconstruction,
    train_bridges,
)
from tl_sparse.bridges.config import EncoderKind
from tl_sparse.bridges.objective import FOLDER
from tl_sparse.cli.inputs import Overwrite, check_out, model_with_tokenizer, say
from tl_sparse.cli.models import cpu_model
from tl_sparse.config import SparseTransformerConfig
from tl_sparse.data import CorpusConfig, TokenizedCorpus, build_corpus, evenly_spaced, windows
from tl_sparse.model.transformer import SparseTransformer
from tl_sparse.storage.atomic_write import write_atomic
from tl_sparse.training.config import TrainingConfig
from tl_sparse.views import Chart, Page, Section, Table, page_html

PAGE = "bridge.html"


@dataclass(frozen=True)
class Bridge:
    """Make bridges between the residual streams of a dense and a sparse model.

    train: the bridges and the sparse model along with them, which is new without --sparse; run
    again with the same options, it goes on where it stopped. fit: linear maps in closed form
    between two given models.
    """

    dense: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DENSE")]
    """Folder of a saved model, a bundled or a released one's name. It stays as it is."""
    out: str
    """Folder for the bridges (in its subfolder bridges), their page (bridge.html), and of a
    training for metrics.jsonl, checkpoints and the sparse model (in its subfolder model)."""
    overwrite: Overwrite = False
    """Replace the bridges that OUT has, where they are fitted."""
    restart: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Begin anew where OUT has an earlier training, whose files are then removed."""
    sparse: str | None = None
    """The sparse model, likewise. A trained one that trains along should keep its density:
    --training.sparsity.anneal-start 0 --training.sparsity.anneal-end 0."""
    method: Literal["train", "fit"] = "train"
    """How bridges are made."""
    start: Literal["random", "fit"] = "random"
    """What a training begins with."""
    encoder: EncoderKind = "abstopk"
    """What follows an encoder's linear map."""
    density: float | None = None
    """Share of the channels that AbsTopK keeps; default that of the sparse model's attention."""
    sequences: int = 512
    """Sequences of text that bridges are fitted to, as long as the shorter context."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The text, read with the dense model's tokenizer."""
    model: SparseTransformerConfig = field(default_factory=cpu_model)
    """Architecture of a new sparse model; d_vocab is the dense model's."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The run; its sparsity means nothing where the sparse model does not train."""
    bridges: BridgeTrainingConfig = field(default_factory=BridgeTrainingConfig)
    """Which losses count, what trains, and the cost of a step."""

    def run(self) -> None:
        """Make them, and say where they are and what they leave unexplained."""
        if self.sequences < 8:
            raise ValueError(f"sequences={self.sequences} must be at least 8")
        if self.method == "fit":
            check_out(self.out, (FOLDER, PAGE), self.overwrite)
        if self.sparse is None and (self.method == "fit" or not self.bridges.train_sparse):
            raise ValueError("there is no sparse model to leave as it is: name it with --sparse")
        dense = model_with_tokenizer(self.dense)
        tokenizer = dense.tokenizer
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        corpus = build_corpus(self.corpus, tokenizer=tokenizer)
        if self.sparse is None:
            config = replace(self.model, d_vocab=dense.config.d_vocab)
            sparse = SparseTransformer(config, tokenizer)
        else:
            sparse = model_with_tokenizer(self.sparse)
        pair = BridgedPair(dense, sparse, self.first_bridges(dense, sparse, corpus))
        if self.method == "train":
            training = self.training
            if not self.bridges.train_sparse:
                training = replace(training, sparsity=None)
            result = train_bridges(
                pair, corpus, training, self.bridges, self.out, restart=self.restart
            )
            say(f"the sparse model's validation loss: {result.validation_loss:.3f} nats")
        length = context(dense, sparse)
        tokens = corpus.validation_sequences(min(64, self.sequences), length)
        found = reconstruction(pair, tokens, progress=False)
        paths = path_table(pair, tokens, back="none", progress=False)
        page = Path(self.out) / PAGE
        sections = (
            Section("Hybrids", (Chart(paths.to_plotly()), Table(paths.to_dataframe()))),
            Section("Sites", (Chart(found.to_plotly()), Table(found.to_dataframe()))),
        )
        title = f"Bridges of {self.dense}"
        html = page_html(Page(title, repr(found), sections=sections))
        if self.method == "fit":
            pair.bridges.save_pretrained(Path(self.out) / FOLDER)
        write_atomic(page, html)
        say(repr(paths))
        say(repr(found))
        say(f"bridges in {Path(self.out) / FOLDER}; page: {page}")

    def first_bridges(
        self, dense: SparseTransformer, sparse: SparseTransformer, corpus: TokenizedCorpus
    ) -> Bridges:
        """Bridges as they are fitted, or as a training begins."""
        changes = {} if self.density is None else {"density": self.density}
        config = BridgesConfig.of(dense, sparse, encoder=self.encoder, **changes)
        if self.method == "train" and self.start == "random":
            return Bridges(config)
        length = context(dense, sparse)
        starts = evenly_spaced(self.sequences, len(corpus.train), length)
        tokens = windows(corpus.train, starts, length, corpus.tokenizer.bos_token_id)
        return fit_bridges(dense, sparse, tokens, config=config).bridges


def context(dense: SparseTransformer, sparse: SparseTransformer) -> int:
    """The longest sequence that both models read."""
    return min(dense.config.n_ctx, sparse.config.n_ctx)
