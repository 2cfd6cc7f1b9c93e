"""Transformers that the probes are made of: principal components, and centring per language."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.decomposition import PCA
from sklearn.utils.validation import check_is_fitted, validate_data


class PrincipalComponents(TransformerMixin, BaseEstimator):
    """``PCA`` with at most ``n_components`` components: fewer where there are fewer samples or features.

    Parameters
    ----------
    n_components : int
    random_state : int, optional
        Of the randomised solver, which is used for wide states.

    Attributes
    ----------
    pca_ : PCA
    n_components_ : int
        Number of components that were kept.

    Examples
    --------
    >>> PrincipalComponents(128).fit_transform(np.random.default_rng(0).normal(size=(6, 40))).shape
    (6, 5)
    """

    def __init__(self, n_components: int = 128, random_state: int | None = None) -> None:
        self.n_components = n_components
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Finds the components of X [n, d].

        Raises
        ------
        ValueError
            ``n_components`` is not a positive whole number, or X has fewer than two samples.
        """
        if not isinstance(self.n_components, int) or self.n_components < 1:
            raise ValueError(f"n_components must be a whole number of at least 1, got {self.n_components!r}")
        X = validate_data(self, X, ensure_min_samples=2)
        self.n_components_ = min(self.n_components, X.shape[0] - 1, X.shape[1])
        pca = PCA(self.n_components_, power_iteration_normalizer="QR", random_state=self.random_state)
        with np.errstate(invalid="ignore", divide="ignore"):  # equal states have no variance to divide by
            self.pca_ = pca.fit(X)
        return self

    def transform(self, X: Any) -> Any:
        """Scores [n, n_components_]."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False)
        return self.pca_.transform(X)

    @property
    def _n_features_out(self) -> int:
        return self.n_components_


class LanguageCenterer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Subtracts from each sample the mean of its language in the training samples.

    The mean of all training samples is subtracted where a language was not seen in training, and where ``languages`` is
    not given. A pipeline passes ``languages`` on after ``sklearn.set_config(enable_metadata_routing=True)``,
    ``set_fit_request(languages=True)`` and ``set_transform_request(languages=True)``.

    Attributes
    ----------
    mean_ : array [d]
    means_ : dict of language to array [d]

    Examples
    --------
    >>> states, languages = np.array([[1.0], [3.0], [10.0]]), np.array(["en", "en", "th"])
    >>> centerer = LanguageCenterer().fit(states, languages=languages)
    >>> centerer.transform(np.array([[4.0], [11.0]]), languages=np.array(["en", "th"])).tolist()
    [[2.0], [1.0]]
    """

    def fit(self, X: Any, y: Any = None, languages: NDArray | None = None) -> Self:
        """Learns the means of X [n, d]; ``languages`` [n] holds the language of each sample."""
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        self.mean_ = X.mean(axis=0)
        self.means_ = {}
        if languages is not None:
            languages = _checked(languages, X)
            self.means_ = {name: X[languages == name].mean(axis=0) for name in np.unique(languages).tolist()}
        return self

    def transform(self, X: Any, languages: NDArray | None = None) -> Any:
        """X minus the means of the samples' languages, [n, d]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        if languages is None:
            return X - self.mean_
        languages = _checked(languages, X)
        means = np.stack([self.means_.get(name, self.mean_) for name in languages.tolist()])
        return X - means

    def fit_transform(self, X: Any, y: Any = None, languages: NDArray | None = None) -> Any:
        """``fit(X, y, languages).transform(X, languages)``."""
        return self.fit(X, y, languages).transform(X, languages)


def _checked(languages: NDArray, X: Any) -> NDArray:
    languages = np.asarray(languages)
    if languages.shape != (X.shape[0],):
        raise ValueError(f"languages must name one language for each of {X.shape[0]} samples, got {languages.shape}")
    return languages
