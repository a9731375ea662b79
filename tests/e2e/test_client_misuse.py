"""What a client says when it is used wrongly."""

import numpy as np
import pytest

from vision_service.client import AsyncVisionClient, VisionClient
from vision_service.errors import InvalidInput, ModelUnavailable

IMAGE = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    "arguments",
    [{"top_k": 2**40}, {"top_k": 1.5}, {"classes": [2**40]}, {"classes": [None]}, {"model": "\ud800"}],
    ids=str,
)
def test_values_that_do_not_fit_are_the_callers_mistake(arguments):
    with VisionClient("127.0.0.1:1") as client, pytest.raises(InvalidInput):
        client.classify(IMAGE, **arguments)


def test_a_closed_client_says_so():
    client = VisionClient("127.0.0.1:1")
    client.close()
    with pytest.raises(ModelUnavailable, match=r"the client of 127.0.0.1:1 is closed; open another"):
        client.classify(IMAGE)


async def test_a_closed_async_client_says_so():
    client = AsyncVisionClient("127.0.0.1:1")
    await client.close()
    with pytest.raises(ModelUnavailable, match="is closed"):
        await client.classify(IMAGE)
