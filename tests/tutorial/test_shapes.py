"""The procedural world: deterministic, honest about what is held out, and its words and pictures agree."""

import torch

from distill.tutorial import shapes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_same_seed_same_pictures():
    def draw(seed):
        g = generator(seed)
        return shapes.render(shapes.sample_attributes(8, g), shapes.sample_style(8, g))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_training_never_sees_held_out_combinations():
    seen = shapes.sample_attributes(4000, generator())
    unseen = shapes.sample_attributes(1000, generator(), held_out=True)
    assert not shapes.is_held_out(seen).any() and shapes.is_held_out(unseen).all()
    assert not {tuple(a) for a in seen.tolist()} & {tuple(a) for a in unseen.tolist()}
    share = shapes.is_held_out(shapes.sample_attributes(20000, generator(), held_out=None)).float().mean()
    assert 0.08 < share < 0.12


def test_every_value_is_trained_on():
    seen = shapes.sample_attributes(4000, generator())
    for column, values in zip(seen.T, shapes.ATTRIBUTES.values()):
        assert len(column.unique()) == len(values)


def test_a_shape_differs_from_its_background():
    a = shapes.sample_attributes(2000, generator())
    for row in a.tolist():
        assert shapes.ATTRIBUTES["colour"][row[1]] != shapes.ATTRIBUTES["background"][row[2]]


def test_prompts_say_what_is_drawn():
    g = generator()
    attributes, stated = shapes.sample_attributes(500, g), shapes.sample_stated(500, g)
    for a, s in zip(attributes, stated):
        said = {
            name: values[i] for (name, values), i, on in zip(shapes.ATTRIBUTES.items(), a.tolist(), s.tolist()) if on
        }
        assert shapes.parse(shapes.prompt(a, s)) == said


def test_prompt_reads_like_the_readme():
    a = torch.tensor([[4, 0, 3, 0, 1]])
    assert shapes.prompt(a[0]) == "a small red ring on a blue background, top left"


def test_pictures_hold_what_is_asked():
    """Colour at the shape's middle, background in a far corner, and the shape where the position says."""
    a = torch.tensor([[0, 0, 3, 1, 1], [1, 4, 0, 0, 4]])
    x = shapes.render(a, torch.zeros(2, len(shapes.STYLE)))
    assert x.shape == (2, 3, 64, 64) and x.min() >= -1 and x.max() <= 1
    red, far = x[0, :, 20, 20], x[0, :, 60, 60]
    assert red[0] > 0.5 > 0 > red[1] and far[2] > far[0]
    blue, far = x[1, :, 43, 43], x[1, :, 5, 5]
    assert blue[2] > blue[0] and far.min() > 0.7


def test_edges_are_anti_aliased():
    x = shapes.render(torch.tensor([[0, 7, 2, 1, 0]]), torch.zeros(1, len(shapes.STYLE)))[0, 0]  # white on black
    between = ((x > -0.3) & (x < 0.5)).sum()
    assert 20 < between < 200  # a ring of grey pixels around a radius of 15


def test_vocabulary_covers_every_prompt():
    words = set(shapes.vocabulary())
    for text in shapes.sample_prompts(500, generator()):
        assert set(text.replace(",", " ,").split()) <= words
