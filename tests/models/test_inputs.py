import torch

from models.inputs import map_tensors


def test_map_tensors_goes_into_everything():
    value = {"a": torch.ones(2), "b": [torch.ones(1), {"c": (torch.ones(3), None, "text")}], "d": 4}
    doubled = map_tensors(lambda tensor: 2 * tensor, value)
    assert doubled["a"].tolist() == [2, 2] and doubled["b"][0].tolist() == [2]
    tensor, *others = doubled["b"][1]["c"]
    assert isinstance(doubled["b"][1]["c"], tuple) and tensor.tolist() == [2, 2, 2]
    assert others == [None, "text"] and doubled["d"] == 4
    assert value["a"].tolist() == [1, 1]
