"""Changes to an ONNX graph that leave its values as they are and save time on a CPU."""

import itertools

import numpy as np


_SHAPES_ONLY = ("Cast", "Expand", "Identity", "Reshape", "Unsqueeze")  # they give what they get, in another form


def drop_zero_masks(proto) -> int:
    """Take out attention masks that add 0 everywhere; returns how many. What served them alone goes too.

    Towers for images make such a mask, as no patch is padding, and add it to the scores of each layer: 3.5 % of the
    time of a ViT-S (RESULTS.md).
    """
    from onnx import numpy_helper

    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}

    def is_always(value: bool, name: str) -> bool:
        while name not in weights and (maker := made_by.get(name)) is not None and maker.op_type in _SHAPES_ONLY:
            name = maker.input[0]
        return name in weights and bool((numpy_helper.to_array(weights[name]).astype(bool) == value).all())

    def is_zero_mask(name: str) -> bool:
        maker = made_by.get(name)
        if maker is None or maker.op_type != "Where":
            return False
        return is_always(True, maker.input[0]) and is_always(False, maker.input[1])

    masked = [node for node in graph.node if node.op_type == "Add" and any(map(is_zero_mask, node.input))]
    kept = {node.output[0]: next(name for name in node.input if not is_zero_mask(name)) for node in masked}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in kept:
                node.input[position] = kept[name]
    _remove_unused(graph)
    return len(masked)


def _remove_unused(graph) -> None:
    used = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):  # a node stands behind what it reads
        if used.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            used.update(node.input)
    for tensor in list(graph.initializer):
        if tensor.name not in used:
            graph.initializer.remove(tensor)


def widen_aliased_layers(proto) -> int:
    """Give hidden layers whose width is a multiple of 1,024 sixteen more neurons that add nothing; returns how many.

    A row of so many floats is a multiple of 4 KiB, so that all rows of a block lie in the same lines of the first cache
    and push each other out: in a ViT-B, with 3,072 neurons, that costs a tenth of the second product (RESULTS.md).
    The new neurons have weights of 0 on both sides, so values stay as they are.
    """
    from onnx import numpy_helper

    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    num_uses = {}
    for name in itertools.chain.from_iterable(node.input for node in graph.node):
        num_uses[name] = num_uses.get(name, 0) + 1

    def pad(name: str, axis: int) -> None:
        array = numpy_helper.to_array(weights[name])
        widths = [(0, 16 if number == axis % array.ndim else 0) for number in range(array.ndim)]
        weights[name].CopyFrom(numpy_helper.from_array(np.pad(array, widths), name))

    def is_weight_product(node) -> bool:
        return node is not None and node.op_type == "MatMul" and node.input[1] in weights

    num_widened = 0
    for node in graph.node:
        if not is_weight_product(node) or weights[node.input[1]].dims[0] % 1024:
            continue
        biases, current = [], node.input[0]
        while (maker := made_by.get(current)) is not None and maker.op_type in ("Add", "Gelu", "Relu"):
            constants = [name for name in maker.input if name in weights]
            biases += constants
            (current,) = [name for name in maker.input if name not in weights] or [""]
        first, second = made_by.get(current), node.input[1]
        if not is_weight_product(first):
            continue
        touched = [first.input[1], *biases, second]
        vectors = all(list(weights[name].dims) == [weights[second].dims[0]] for name in biases)
        if vectors and all(num_uses[name] == 1 for name in touched):
            for name in (first.input[1], *biases):
                pad(name, -1)
            pad(second, 0)
            num_widened += 1
    if num_widened:
        del graph.value_info[:]  # the shapes in between, which runtimes infer anew
    return num_widened
