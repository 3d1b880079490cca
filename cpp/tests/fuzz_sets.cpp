// Any bytes as codes of sets: refused, or decoded to routes that are coded as the same bytes again.
#include "fuzz.hpp"
#include "r3/set_routes.hpp"

namespace {

template <class Id>
void decode(Input input, r3::SetShape const& shape) {
  auto versions = input.numbers<std::int32_t>(shape.num_tokens);
  auto const rest = std::as_bytes(input.rest());
  std::vector<std::byte> const codes(rest.begin(), rest.end());
  std::vector<Id> ids(shape.num_tokens * shape.num_layers * shape.topk);
  std::span<std::int32_t const> const view(versions);
  if (accepted([&] { r3::decode_sets(shape, std::span(codes), view, ids.data()); })) {
    std::vector<std::byte> again(codes.size());
    r3::encode_sets<Id>(shape, ids.data(), view, again);
    if (again != codes) {
      __builtin_trap();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  Input input(data, size);
  r3::SetShape const shape{input.up_to(5), input.up_to(9), input.up_to(18), input.up_to(1100)};
  // As the bindings do: what ids cannot be of this E is refused before.
  if (accepted([&] { r3::check_set_size(shape.num_experts, shape.topk); })) {
    shape.num_experts <= 256 ? decode<std::uint8_t>(input, shape) : decode<std::uint16_t>(input, shape);
  }
  return 0;
}
