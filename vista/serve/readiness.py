"""Whether a worker can answer requests, and its problems: the answer of /readyz."""

from __future__ import annotations

import os
from typing import Any

from vista.model.saved_model import CONFIG_FILE
from vista.serve.served_models import ServedModels


def readiness(models: ServedModels) -> dict[str, Any]:
    """The state of a worker.

    Returns:
        ready: whether the store of at least one open model answers. If those of some models do not, load balancers must
            not take all machines out of service.
        generation: that of the store; with several models, those of the open ones by name.
        problems: texts; with several models, they begin with the name of one.
    """
    problems: dict[str, list[str]] = {name: [] for name in models.configs}
    generations, answers = {}, []
    with models.open_services() as services:
        for name, service in services.items():
            answers.append(service.reads_store())
            if not answers[-1]:
                problems[name].append("the store does not answer (see the log)")
            problems[name] += service.problems()
            generations[name] = service.scorer.manifest.generation
    for name, config in models.configs.items():
        if name in generations:
            continue
        problem = models.problem(name)
        if problem is not None:
            problems[name].append(problem)
        elif not os.path.isfile(os.path.join(config.model, CONFIG_FILE)):
            problems[name].append("the folder of the model cannot be read, so it cannot be opened")
    several = models.are_several
    return {
        "ready": any(answers),
        "generation": generations if several else next(iter(generations.values()), None),
        "problems": [f"{name}: {text}" if several else text for name, own in problems.items() for text in own],
    }
