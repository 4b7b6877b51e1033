from __future__ import annotations

import numpy as np

from pbe.editing.images import composite, to_bytes


def test_every_byte_outside_the_hole_survives():
    source = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    edit = np.full((16, 16, 3), 0.3, np.float32)
    hole = np.zeros((16, 16), bool)
    hole[3, 4] = True
    result = to_bytes(composite(source, edit, hole))
    np.testing.assert_array_equal(result[~hole], source[~hole])
    assert (result[3, 4] == round(0.3 * 255)).all()


def test_bytes_are_rounded():
    assert to_bytes(np.array([0.0, 1.0, 0.501 / 255, 254.4 / 255], np.float32)).tolist() == [0, 255, 1, 254]
