"""Get an object instead of text, and watch its fields fill while the model writes it.

python examples/structured.py                               # the demo, a toy: the shape is right,
                                                            # what stands in it is nonsense
python examples/structured.py LLM-Research/gemma-2-9b-it    # Gemma 2 itself
"""

import sys
from typing import Literal

from pydantic import BaseModel, Field

from gemma2_stream import ChatGemma2


class Review(BaseModel):
    """What a review of a film says."""

    title: str = Field(max_length=40)
    mood: Literal["good", "mixed", "bad"]
    stars: int = Field(ge=1, le=5)


chat = ChatGemma2(sys.argv[1] if len(sys.argv) > 1 else "demo", max_new_tokens=200)
text = "Spirited Away is a marvel. I have seen it five times, and it gets better."

# A JSON schema gives dicts, and those can be had half full.
for part in chat.with_structured_output(Review.model_json_schema()).stream(text):
    print(part)

# A class gives objects, which have been validated.
review = chat.with_structured_output(Review).invoke(text)
print(f"{review!r}")
