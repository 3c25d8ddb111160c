"""How a figure stands: where head, chest, hands, knees and feet are in each pose, in cells of a 32 x 32 grid.

Every pose is drawn facing right; its outline alone tells it from the others, whatever the figure wears.
"""

from dataclasses import dataclass

Point = tuple[float, float]  # cells from the left, cells from the top


@dataclass(frozen=True)
class Pose:
    """A figure's joints. Pairs are (back, front), the front one being on the side that the figure faces."""

    head: Point  # shift from where a standing figure's is
    chest: Point  # likewise
    hands: tuple[Point, Point]
    knees: tuple[Point, Point]
    feet: tuple[Point, Point]  # heels; the sole is at the bottom
    tool: Point  # which way a thing in the front hand points
    is_off_the_ground: bool = False

    @property
    def hips(self) -> tuple[Point, Point]:
        """Where the legs begin."""
        x, y = self.chest
        return (13 + x, 20 + y), (18 + x, 20 + y)

    @property
    def shoulders(self) -> tuple[Point, Point]:
        """Where the arms begin."""
        x, y = self.chest
        return (11 + x, 16 + y), (20 + x, 16 + y)


POSES = {
    "standing": Pose(
        head=(0, 0), chest=(0, 0), hands=((7, 21), (24, 21)), knees=((13, 24), (18, 24)),
        feet=((12, 29), (18, 29)), tool=(0, -1),
    ),
    "running": Pose(
        head=(3, 1), chest=(1, 0), hands=((4, 17), (28, 16)), knees=((9, 24), (24, 22)),
        feet=((2, 24), (24, 29)), tool=(0, -1),
    ),
    "jumping": Pose(
        head=(0, 0), chest=(0, -1), hands=((3, 13), (28, 8)), knees=((11, 22), (23, 20)),
        feet=((6, 26), (19, 25)), tool=(0, -1), is_off_the_ground=True,
    ),
    "arms raised": Pose(
        head=(0, 2), chest=(0, 1), hands=((5, 4), (26, 4)), knees=((11, 25), (20, 25)),
        feet=((8, 29), (21, 29)), tool=(-1, 0),
    ),
    "crouching": Pose(
        head=(1, 7), chest=(0, 5), hands=((4, 25), (27, 22)), knees=((6, 24), (24, 24)),
        feet=((4, 29), (22, 29)), tool=(0, -1),
    ),
}  # fmt: skip
