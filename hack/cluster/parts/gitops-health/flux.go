package main

import (
	"context"
	"fmt"
	"os"

	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// newFlux sets up what Flux's kustomize-controller asks for the health of a Kustomization's resources.
func newFlux(file string) (Engine, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var kustomization struct {
		Spec struct {
			HealthCheckExprs []kustomize.CustomHealthCheck `json:"healthCheckExprs"`
		} `json:"spec"`
	}
	if err := yaml.Unmarshal(text, &kustomization); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	newReader, err := cel.NewStatusReader(kustomization.Spec.HealthCheckExprs)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	reader := newReader(meta.NewDefaultRESTMapper(nil))
	return func(resource *unstructured.Unstructured) (Verdict, error) {
		if kind := resource.GroupVersionKind().GroupKind(); !reader.Supports(kind) {
			return Verdict{}, fmt.Errorf("%s has no health check for %s", file, kind)
		}
		found, err := reader.ReadStatusForObject(context.Background(), nil, resource)
		if err != nil {
			return Verdict{}, err
		}
		if found.Error != nil {
			return Verdict{string(found.Status), found.Error.Error()}, nil
		}
		return Verdict{string(found.Status), found.Message}, nil
	}, nil
}
