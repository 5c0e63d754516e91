// Several kernels for one op, which callers name.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace bnb {

template <class Product>
struct Path {
  const char* name;
  bool (*fits)(const Product&);  // whether it takes a product
  int size = -1;                 // of its tiles, as an index of a table; for paths that differ in this alone
};

template <class Product, std::size_t kCount>
struct Paths {
  const char* op;
  Path<Product> paths[kCount];

  // The path of this name. Throws std::invalid_argument where it does not take the product.
  const Path<Product>& named(const char* name, const Product& product) const {
    for (const Path<Product>& path : paths) {
      if (!std::strcmp(name, path.name) && path.fits(product)) return path;
    }
    throw std::invalid_argument(std::string(op) + ": no path '" + name + "' takes this product; " + op + "_paths names those that do");
  }

  const Path<Product>& first(const Product& product) const {  // that takes a product; the last of them takes every one
    const Path<Product>* path = paths;
    while (!path->fits(product)) ++path;
    return *path;
  }

  // The names of those that take a product, in order.
  std::vector<std::string> names(const Product& product) const {
    std::vector<std::string> names;
    for (const Path<Product>& path : paths) {
      if (path.fits(product)) names.push_back(path.name);
    }
    return names;
  }
};

}  // namespace bnb
