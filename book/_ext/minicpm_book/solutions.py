"""One fold for a solution: its reasons and, in the same box, its code.

In a notebook they are two cells, and each is folded by itself there.
"""

from itertools import takewhile

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx_exercise.nodes import solution_node


def is_solution(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Element) and "tag_solution" in node.get("classes", ())


class OneFold(SphinxPostTransform):
    """Put the code of a solution behind its reasons, before cells are folded (myst-nb does so at 199)."""

    default_priority = 100

    def run(self):
        for solution in self.document.findall(solution_node):
            siblings = solution.parent.children
            behind = siblings[siblings.index(solution) + 1 :]
            for cell in list(takewhile(is_solution, behind)):
                solution.parent.remove(cell)
                cell["hide_mode"] = None
                cell["classes"] = [name for name in cell["classes"] if name != "tag_hide-cell"]
                solution += cell


def setup(app):
    app.add_post_transform(OneFold)
