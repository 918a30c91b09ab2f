"""Chat templates of our own that behave like those of the families people train: same order, same refusals."""

from __future__ import annotations

HERMES = (
    # tools in the system turn, calls as JSON between tags, results of one round together in a user turn (Qwen2.5)
    "{%- set system = messages[0].content if messages[0].role == 'system' else 'You help.' %}"
    "{{- '<|im_start|>system\n' + system }}"
    "{%- if tools %}{{- '\n\nTools:\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}"
    "{{- '\n</tools>' }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{{- '<|im_start|>assistant' }}{%- if message.content %}{{- '\n' + message.content }}{%- endif %}"
    "{%- for call in message.tool_calls %}"
    '{{- \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

QWEN3 = (
    # as above, and reasoning before the last question is left out; the last answers always have a think block
    "{%- set last = namespace(user=0) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- if messages[0].role == 'system' or tools %}{{- '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}"
    "{%- for tool in tools or [] %}{{- '\n' + tool | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}"
    "{%- elif message.role == 'assistant' %}"
    "{%- set reasoning = message.reasoning_content or '' %}{%- set content = message.content %}"
    "{%- if not reasoning and '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > last.user and (loop.last or reasoning) %}"
    "{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if not loop.first or content %}{{- '\n' }}{%- endif %}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

LLAMA3 = (
    # tools in the first question, one call a turn, results in a turn of their own
    "{{- bos_token }}{%- set first = namespace(user=true) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{- '<|im_start|>system\n\n' + message.content + '<|im_end|>' }}"
    "{%- elif message.role == 'user' %}{{- '<|im_start|>user\n\n' }}"
    "{%- if first.user and tools %}{{- 'Functions:\n' }}"
    "{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}"
    "{%- endif %}{%- set first.user = false %}{{- message.content + '<|im_end|>' }}"
    "{%- elif message.role in ('tool', 'ipython') %}"
    "{{- '<|im_start|>ipython\n\n' + message.content | tojson + '<|im_end|>' }}"
    "{%- elif message.tool_calls %}"
    "{%- if message.tool_calls | length != 1 %}{{- raise_exception('One call at a time, please.') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}"
    '{{- \'<|im_start|>assistant\n\n{"name": "\' + call.name + \'", "parameters": \' + call.arguments | tojson }}'
    "{{- '}<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>assistant\n\n' + message.content + '<|im_end|>' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"
)

TOOL_TEMPLATES = {"hermes": HERMES, "qwen3": QWEN3, "llama3": LLAMA3}
