"""The models, data sets, training and tables of the paper, built on mcobjectives.

In reading order:

- what to run: `paper` (its numbers and grids), `presets`, `config` (what determines a run), `tables` (its cells)
- data: `sources`, `datasets`, `downloads`, `amat`, `binarisation`, `labels`, `errors`
- the model: `models`, `precision`, `pruning`
- a training step: `engine`, `compiling`, `devices`, `memory`
- a run: `training`, `evaluating`, `cells` (train, evaluate, record), `hooks`, `checkpoints`, `files`, `logs`,
  `provenance`
- many runs: `in_turn`, `stacking`, `side_by_side`, `estimates` (how long they will take)
- what was found: `results`, `records`, `verdicts` (when a difference is one), `findings` (the paper's claims)
- as text: `words`, `render` (tables), `blocks`, `metric_tables`, `curves`, `charts`, `origins`,
  `report` (all of it as a page)
- as pictures: `figures`, `drawing`
"""
