"""The report's page: markup, with $names where the numbers go."""

from string import Template

from distill.page import STYLE

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Distillation report</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<main>
<h1>A small model that learned from a larger one</h1>
<p>$quality</p>
<p>$speed</p>
<div class="tiles">$tiles</div>

<h2>Results on text that no model has seen</h2>
<div class="scroll">$table</div>
<p class="soft">Bits per byte: the code length of the held-out files under the model, over their
size; lower is better. Agreement: how often a model's first choice of the next token is the
teacher's. Training: the steps of that stage, for the student with the teacher's forward pass.
Reading: held-out text, many tokens at a time. Writing: one token after another.</p>

<h2>Figures</h2>
<div class="plots">
<figure class="plot"><figcaption>Learning, on a part of the held-out text</figcaption>
$figure_curves</figure>
<figure class="plot"><figcaption>Quality against size</figcaption>$figure_size</figure>
<figure class="plot"><figcaption>What the teacher was worth, file by file</figcaption>
$figure_files</figure>
<figure class="plot"><figcaption>Speed against eager torch</figcaption>$figure_speed</figure>
</div>

<h2>What the models write</h2>
$samples

<h2>How this was made</h2>
<dl>$setup</dl>
</main>
</body>
</html>
"""
)
